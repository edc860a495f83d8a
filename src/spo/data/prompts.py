"""Prompts: cleaned, compared, deduplicated, split without leakage. Three forms of a prompt:

- `clean`: what is drawn. NFC (as the CLIP tokenizer does), no invisible characters, single spaces.
- `normalize`: what duplicates share. Full and half width, ligatures and Arabic positional forms are another way
  to print the same text, so they are one; NFKC as a whole is not used, for it makes CO2 of CO\u2082 and 25 of
  2\u2075. Lower case, as the tokenizer has it, not case folding, which makes `Masse` of `Ma\u00dfe`. Lower case
  knows no language: Turkish KIZ is not k\u0131z, so both are kept.
- `key`: what near duplicates share, between evaluation, training and pairs, and what a block list is held
  against. Normalized, case folded, without quotes and punctuation at the ends of words and without emoji's
  presentation selectors. Letters, marks and signs stay: C, C++ and C# differ, so do 5 and -5.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spo.data.prompt_files import read_prompts, read_text

LONGEST = 10_000  # characters; a model reads some 77 tokens

# Controls but white space, soft hyphen, zero-width space and no-break space, bidi and invisible operators. Joiners
# and variation selectors stay, for scripts and emoji need them; so does what this Python has no name for yet.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
# Tags are kept in the flags of regions (a black flag, tags, the end tag), where they are seen.
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[\U000e0000-\U000e007f]")
# Nothing is seen of a prompt of these alone.
_BLANK = re.compile(
    "[\\s\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c\u200d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]*"
)
_SAME_TEXT = {f"<{tag}>" for tag in "wide narrow compat isolated initial medial final noBreak".split()}
_QUOTES = "\"'`\u00ab\u00bb\u2018-\u201f\u2039\u203a\u300c-\u300f\u3008-\u300b"
_STOPS = ".,;:!?\u00b7\u0589\u060c\u061b\u061f\u06d4\u0964\u0965\u1362\u17d4\u17d5\u3001\u3002"
_COMMA = re.compile("[,;\u060c\u061b\u3001](?![0-9])")  # between words, also where no space follows
_EDGES = re.compile(f"(?<!\\S)[{_QUOTES}\u00a1\u00bf]+|[{_QUOTES}{_STOPS}]+(?!\\S)")


def read_clean(path: str | Path) -> list[str]:
    """The prompts of a file as the model gets them, with the empty ones.

    Raises:
        ValueError: as of `read_prompts` and `check_text`.
    """
    prompts = read_prompts(path)
    for number, prompt in enumerate(prompts, 1):
        check_text(prompt, f"{path}: prompt {number}")
    return [clean(prompt) for prompt in prompts]


def check_text(prompt: str, where: str) -> None:
    """A prompt must be text, and not a whole book.

    Raises:
        ValueError: `where` and what is wrong.
    """
    if not is_text(prompt):
        raise ValueError(f"{where} is no text: it holds half of a UTF-16 pair, a wrong byte or a zero")
    if len(prompt) > LONGEST:
        raise ValueError(f"{where} has {len(prompt)} characters, more than {LONGEST}")


def is_text(prompt: str) -> bool:
    """Whether it can be written as UTF-8, without zeros: no half of a surrogate pair, no U+0000."""
    return "\0" not in prompt and not re.search("[\ud800-\udfff]", prompt)


def clean(prompt: str) -> str:
    """NFC, no control or invisible characters, single spaces."""
    if not prompt.isascii():
        prompt = _TAGS.sub(r"\1", prompt)
    # the order matters: what was apart may compose once nothing invisible is between
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", prompt)).split())


def normalize(prompt: str) -> str:
    """What duplicates share: clean, forms of print and case set aside; "" if there is nothing to see."""
    text = clean(prompt)
    if not text.isascii():
        text = clean("".join(map(_same_text, text)))
    return "" if _BLANK.fullmatch(text) else unicodedata.normalize("NFC", text.lower())


def key(prompt: str) -> str:
    """What near duplicates share: words without punctuation at their ends; the prompt itself if it has none."""
    text = unicodedata.normalize("NFC", normalize(prompt).casefold())
    words = _EDGES.sub("", re.sub("[\ufe0e\ufe0f]", "", _COMMA.sub(" ", text)))
    return " ".join(words.split()) or text


@dataclass
class Kept:
    """Cleaned prompts, and why the others were left out: in = kept + left out."""

    prompts: list[str]
    left_out: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, why)


def select(
    prompts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    forbidden: Iterable[str] = (),
    blocked: BlockList | None = None,
) -> Kept:
    """Clean prompts and leave out empty, unreadable, forbidden, repeated, blocked and too long ones.

    Args:
        length: tokens of a prompt, with start and end.
        forbidden: keys (see `key`) of prompts that must not be among them.
    """
    kept, seen, never = Kept([]), set[str](), set(forbidden)
    for number, raw in enumerate(prompts):
        prompt, same, near = clean(raw), normalize(raw), key(raw)
        reason = None
        if not is_text(raw):
            reason = "not_text"
        elif not same:
            reason = "empty"
        elif near in never:
            reason = "elsewhere"
        elif same in seen:
            reason = "duplicate"
        elif blocked is not None and near in blocked:
            reason = "blocked"
        elif length(prompt) > max_tokens:
            reason = "too_long"
        if reason is None:
            seen.add(same)
            kept.prompts.append(prompt)
        else:
            kept.left_out[reason] += 1
            kept.reasons.append((number, reason))
    return kept


def by_hash(prompts: Sequence[str], seed: int) -> list[str]:
    """In an order that depends on the seed and each prompt's content alone, not on the file's order."""

    def rank(prompt: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed} {key(prompt)}".encode()).digest(), prompt

    return sorted(prompts, key=rank)


def check_vocabulary(prompts: Iterable[str], path: str | Path) -> None:
    """Every word of the prompts must be in the list at `path` (one a line).

    Raises:
        ValueError: the first prompt with other words, which ones, and words near to them.
    """
    known = set(read_text(Path(path)).split())
    for prompt in prompts:
        strange = [w for w in prompt.casefold().split() if w not in known]
        if strange:
            near = [m for w in strange[:10] for m in difflib.get_close_matches(w[:100], sorted(known), n=1)]
            hint = f"; near to it: {', '.join(near)}" if near else ""
            words = ", ".join(repr(word[:100]) for word in strange[:10])
            raise ValueError(
                f"prompt {prompt[:200]!r}: {words} not in the vocabulary of the model ({path}){hint}"
            )


class BlockList:
    """Words and phrases that no prompt may have, found as whole words in a prompt's key.

    A word ends where no letter, digit, mark or joiner goes on, nor + or # after it (so C does not block C++).
    Thai, Lao, Burmese, Khmer, Chinese and Japanese put no spaces between words: there a phrase is found within
    other text too, unless a mark follows that changes its last letter. Between the words of a phrase there may be
    spaces, hyphens or underscores. Inflected forms and Korean particles need a line of their own.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self.pattern = re.compile("|".join(sorted(map(_whole_words, phrases), key=len, reverse=True)))

    @classmethod
    def load(cls, path: str | Path) -> BlockList:
        """From a text file: one word or phrase a line; empty lines and those that start with # are skipped.

        Raises:
            ValueError: no such file, or nothing in it.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no block list there; look at prompts.block_list in params.yaml")
        phrases = {key(line) for line in read_prompts(path) if not line.startswith("#")} - {""}
        if not phrases:
            raise ValueError(f"{path}: the block list is empty; leave prompts.block_list out instead")
        return cls(phrases)

    def __contains__(self, name: str) -> bool:
        """Whether a prompt's key has one of them as whole words."""
        return self.pattern.search(name) is not None
