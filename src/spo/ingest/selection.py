"""Select prompts: clean ones, each once, and none that is blocked, too long or used elsewhere."""

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from spo.data.prompts import clean, exact_key, flaw, key
from spo.ingest.prompt_files import read_prompts, read_text

# Scripts without spaces between words, by the Unicode names of their characters.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass
class Selection:
    """Cleaned prompts, and the rejected ones by reason; every prompt read is in one of the two."""

    prompts: list[str]
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, reason)

    @property
    def read(self) -> int:
        return len(self.prompts) + len(self.reasons)


@dataclass(frozen=True)
class BlockList:
    """Words and phrases that no prompt may contain."""

    pattern: re.Pattern[str]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a text file with one word or phrase per line; empty lines and comments (#) are skipped."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such block list; check prompts.block_list in params.yaml")
        phrases = {key(line) for line in read_prompts(path) if not line.startswith("#")} - {""}
        if not phrases:
            raise ValueError(f"{path}: the block list is empty; set prompts.block_list to null instead")
        return cls(re.compile("|".join(map(re.escape, sorted(phrases, key=lambda p: (-len(p), p))))))

    def __contains__(self, name: str) -> bool:
        """Whether a prompt's key contains a phrase, as complete words or in a script without spaces."""
        start = 0
        while match := self.pattern.search(name, start):
            before, after = name[: match.start()], name[match.end() :]
            if _unspaced(match[0]) or not (_begins_earlier(before, match[0]) or _continues(match[0], after)):
                return True
            start = match.start() + 1
        return False


def _begins_earlier(before: str, phrase: str) -> bool:
    """Whether the first word of a phrase begins in the text before it, or its number has a minus there."""
    minus = before[-1:] == "-" and phrase[0].isdigit() and not _in_word(before[-2:-1])
    return minus or _in_word(before[-1:])


def _continues(phrase: str, after: str) -> bool:
    """Whether the last word of a phrase continues after it; + and # continue one letter only (C++, C#)."""
    rest = after.lstrip("+#")
    named = len(phrase.rpartition(" ")[2]) == 1 and rest != after and not _in_word(rest[:1])
    return named or _in_word(after[:1])


def _in_word(character: str) -> bool:
    """Whether a character is a letter, mark or digit of a script with spaces; False for ""."""
    return unicodedata.category(character)[0] in "LMN" and not _unspaced(character) if character else False


def _unspaced(phrase: str) -> bool:
    return any(unicodedata.name(c, "").startswith(UNSPACED) for c in phrase)


def select(
    prompts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    forbidden: Iterable[str] = (),
    blocked: BlockList | None = None,
) -> Selection:
    """Clean prompts and reject empty, broken, blocked, too long, duplicate and forbidden ones.

    Args:
        length: counts the tokens of a prompt, start and end tokens included.
        forbidden: keys (see `key`) of prompts that must not be selected.
    """
    selection, excluded = Selection([]), set(forbidden)
    texts, names = set[str](), set[str]()
    for number, raw in enumerate(prompts):
        prompt, name = clean(raw), key(raw)
        reason = None
        if flaw(raw):
            reason = "broken_text"
        elif not name:
            reason = "empty"
        elif name in excluded:
            reason = "elsewhere"
        elif exact_key(prompt) in texts:
            reason = "duplicate"
        elif name in names:
            reason = "near_duplicate"
        elif blocked is not None and name in blocked:
            reason = "blocked"
        elif length(prompt) > max_tokens:
            reason = "too_long"
        if reason is None:
            texts.add(exact_key(prompt))
            names.add(name)
            selection.prompts.append(prompt)
        else:
            selection.rejected[reason] += 1
            selection.reasons.append((number, reason))
    return selection


def by_hash(prompts: Sequence[str], seed: int) -> list[str]:
    """Sort prompts by a hash of seed and content: the order does not depend on the order of the file."""

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed} {key(prompt)}".encode()).digest()

    return sorted(prompts, key=rank)


def check_vocabulary(prompts: Iterable[str], path: str | Path) -> None:
    """Check that every word of the prompts is in the list at `path` (one word per line)."""
    known = set(read_text(Path(path)).split())
    for prompt in prompts:
        unknown = [w for w in prompt.casefold().split() if w not in known]
        if unknown:
            near = [m for w in unknown for m in difflib.get_close_matches(w, sorted(known), n=1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(
                f"prompt {prompt!r}: {', '.join(map(repr, unknown))} not in the vocabulary of the model "
                f"({path}){hint}"
            )


def is_validation(caption: str, fraction: float) -> bool:
    """Whether a caption's pairs are for validation, by the hash of its key: no prompt is in both parts.

    The same for every seed, so that a scorer trained on the training part never sees the other.
    """
    digest = hashlib.sha256(key(caption).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
