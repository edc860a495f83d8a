"""Select prompts: clean ones, each once, and none that is blocked, too long or used elsewhere."""

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import regex

from spo.data.prompts import clean, exact_key, flaw, key
from spo.ingest.prompt_files import read_prompts, read_text

# A character of a script without spaces between words, and a letter, mark or digit of the other scripts.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]"


@dataclass
class Selection:
    """Cleaned prompts, and the rejected ones by reason; every prompt read is in one of the two."""

    prompts: list[str] = field(default_factory=list)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, reason)

    @property
    def rejected(self) -> Counter[str]:
        return Counter(reason for _, reason in self.reasons)

    @property
    def read(self) -> int:
        return len(self.prompts) + len(self.reasons)


def block_list(path: str | Path) -> regex.Pattern[str]:
    """A pattern that finds blocked words in a prompt's key, as complete words or in a script without spaces.

    The file has one word or phrase per line; empty lines and comments (#) are skipped.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such block list; check prompts.block_list in params.yaml")
    phrases = {key(line) for line in read_prompts(path) if not line.startswith("#")} - {""}
    if not phrases:
        raise ValueError(f"{path}: the block list is empty; set prompts.block_list to null instead")
    return regex.compile("|".join(map(_complete, sorted(phrases))), regex.VERSION1)


def _complete(phrase: str) -> str:
    """A pattern that finds a phrase, but not within a longer word: C is not in C++, nor 5 in -5."""
    exact = regex.escape(phrase, special_only=True)
    if regex.search(UNSPACED, phrase, regex.VERSION1):
        return exact
    minus = rf"(?<!(?<!{WORD})-)" if phrase[0].isdigit() else ""
    signs = rf"(?![+#]++(?!{WORD}))" if len(phrase.rpartition(" ")[2]) == 1 else ""
    return rf"(?<!{WORD}){minus}{exact}{signs}(?!{WORD})"


def select(
    prompts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    forbidden: Iterable[str] = (),
    blocked: regex.Pattern[str] | None = None,
) -> Selection:
    """Clean prompts and reject empty, broken, blocked, too long, duplicate and forbidden ones.

    Args:
        length: counts the tokens of a prompt, start and end tokens included.
        forbidden: keys (see `key`) of prompts that must not be selected.
    """
    selection, excluded = Selection(), set(forbidden)
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
        elif blocked is not None and blocked.search(name):
            reason = "blocked"
        elif length(prompt) > max_tokens:
            reason = "too_long"
        if reason is None:
            texts.add(exact_key(prompt))
            names.add(name)
            selection.prompts.append(prompt)
        else:
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
