"""Prompts cleaned, deduplicated and split without leakage."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spo.data.prompt_files import read_prompts

# Punctuation that says something: C# is not C, 1/2 is not 12.
SIGNS = frozenset("#%&@*/\\")
# Scripts that are written without spaces between words, by the names of their characters.
UNSPACED = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def clean(prompt: str) -> str:
    """NFC, no control or invisible characters, single spaces."""
    text = unicodedata.normalize("NFC", prompt)
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or _visible(c))
    return " ".join(text.split())


def same(prompt: str) -> str:
    """The text by which duplicates are found: NFC, as CLIP's tokenizer normalises, and single spaces."""
    return clean(prompt)


def key(prompt: str) -> str:
    """The text that near duplicates share: NFKC, case folded, without punctuation that carries no meaning.

    Letters, marks, digits, symbols and signs stay in every script. Of punctuation stay the signs of SIGNS, a
    minus before a number, and what stands between two digits, as in 3.5 and 16:9.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", clean(prompt)).casefold())
    text = text.replace("\u2212", "-")
    padded = f" {text} "
    kept = "".join(c if _means(padded[i], c, padded[i + 2]) else " " for i, c in enumerate(text))
    return " ".join(kept.split()) or " ".join(text.split())


def _means(before: str, character: str, after: str) -> bool:
    """Whether a character between its neighbours carries meaning."""
    if unicodedata.category(character)[0] != "P" or character in SIGNS:
        return True
    if character == "-":
        return after.isdigit() and not before.isalnum()
    return character in ".,:" and before.isdigit() and after.isdigit()


def flaw(prompt: str) -> str | None:
    """Why a prompt is no text that can be encoded, or None."""
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        return "half of a surrogate pair"
    return "a NUL character" if "\0" in prompt else None


@dataclass
class Kept:
    """Cleaned prompts, and why the others were left out: in = kept + left out."""

    prompts: list[str]
    left_out: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, why)


@dataclass(frozen=True)
class BlockList:
    """Words and phrases that no prompt may have."""

    pattern: re.Pattern[str]

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
        return cls(re.compile("|".join(map(re.escape, sorted(phrases, key=lambda p: (-len(p), p))))))

    def __contains__(self, name: str) -> bool:
        """Whether a prompt's key has one of them: as whole words, or anywhere in scripts without spaces."""
        start = 0
        while match := self.pattern.search(name, start):
            before, after = name[: match.start()][-1:], name[match.end() :][:1]
            if _unspaced(match[0]) or not (_in_word(before) or _in_word(after)):
                return True
            start = match.start() + 1
        return False


def _in_word(character: str) -> bool:
    """Whether it is a letter, a mark or a digit; nothing is none."""
    return bool(character) and unicodedata.category(character)[0] in "LMN"


def _unspaced(phrase: str) -> bool:
    return any(unicodedata.name(c, "").startswith(UNSPACED) for c in phrase)


def select(
    prompts: Iterable[str],
    length: Callable[[str], int],
    max_tokens: int,
    forbidden: Iterable[str] = (),
    blocked: BlockList | None = None,
) -> Kept:
    """Clean prompts and leave out empty, broken, blocked, too long, repeated and forbidden ones.

    Args:
        length: tokens of a prompt, with start and end.
        forbidden: keys (see `key`) of prompts that must not be among them.
    """
    kept, never = Kept([]), set(forbidden)
    texts, names = set[str](), set[str]()
    for number, raw in enumerate(prompts):
        prompt, name = clean(raw), key(raw)
        reason = None
        if flaw(raw):
            reason = "broken_text"
        elif not name:
            reason = "empty"
        elif name in never:
            reason = "elsewhere"
        elif same(prompt) in texts:
            reason = "duplicate"
        elif name in names:
            reason = "near_duplicate"
        elif blocked is not None and name in blocked:
            reason = "blocked"
        elif length(prompt) > max_tokens:
            reason = "too_long"
        if reason is None:
            texts.add(same(prompt))
            names.add(name)
            kept.prompts.append(prompt)
        else:
            kept.left_out[reason] += 1
            kept.reasons.append((number, reason))
    return kept


def by_hash(prompts: Sequence[str], seed: int) -> list[str]:
    """In an order that depends on the seed and each prompt's content alone, not on the file's order."""

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed} {key(prompt)}".encode()).digest()

    return sorted(prompts, key=rank)


def check_vocabulary(prompts: Iterable[str], path: str | Path) -> None:
    """Every word of the prompts must be in the list at `path` (one a line).

    Raises:
        ValueError: the first prompt with other words, which ones, and words near to them.
    """
    known = set(Path(path).read_text(encoding="utf-8").split())
    for prompt in prompts:
        strange = [w for w in prompt.casefold().split() if w not in known]
        if strange:
            near = [m for w in strange for m in difflib.get_close_matches(w, sorted(known), n=1)]
            hint = f"; near to it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"prompt {prompt!r}: {', '.join(map(repr, strange))} not in the vocabulary of the model "
                f"({path}){hint}"
            )


def _visible(character: str) -> bool:
    """Neither control, format, surrogate nor unassigned; joiners stay, scripts and emoji need them."""
    return character in "\u200c\u200d" or unicodedata.category(character)[0] != "C"
