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
SIGNS = frozenset("#%&@*/\\\u2030\u2031\u2032\u2033\u00a7\u00b6\u2020\u2021\u203b")
DASHES = frozenset("-\u2013")  # a minus, where a number follows
# Scripts that are written without spaces between words, by the names of their characters.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
# No shape and no meaning: soft hyphen, zero-width space, direction and byte order marks, annotations. Listed,
# as Python's own table calls emoji younger than itself unassigned, and the tags of a flag invisible.
INVISIBLE = frozenset(
    map(chr, (0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, 0xFFF9, 0xFFFA, 0xFFFB))
) | frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2061, 0x2070))))


def clean(prompt: str) -> str:
    """NFC, no control or invisible characters, single spaces; joiners, variation selectors and tags stay."""
    text = "".join(" " if c.isspace() else c for c in prompt if c.isspace() or _visible(c))
    return " ".join(unicodedata.normalize("NFC", text).split())


def _visible(character: str) -> bool:
    return character not in INVISIBLE and unicodedata.category(character) not in ("Cc", "Cs")


def same(prompt: str) -> str:
    """The text by which duplicates are found: NFC, case folded, single spaces.

    Not NFKC: CO₂ and CO2, or x² and x2, are tokenized and drawn differently.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", clean(prompt)).casefold())


def key(prompt: str) -> str:
    """The text that near duplicates share: as `same`, of one width, without punctuation that means nothing.

    Letters, marks, digits, symbols and signs stay in every script. Of punctuation stay the signs of SIGNS, a
    minus before a number, what stands between two digits or before a decimal, as in 3.5, 16:9 and .5, and
    brackets that enclose no word, as in :).
    """
    text = same("".join(map(_of_one_width, same(prompt)))).replace("\u2212", "-")
    padded = f" {text}  "
    kept = "".join(c if _means(padded[i], c, padded[i + 2 : i + 4]) else " " for i, c in enumerate(text))
    return " ".join(kept.split()) or text


def _of_one_width(character: str) -> str:
    """The ordinary form of full-width, half-width and small letters and signs."""
    if unicodedata.decomposition(character).startswith(("<wide>", "<narrow>", "<small>")):
        return unicodedata.normalize("NFKC", character)
    return character


def _means(before: str, character: str, after: str) -> bool:
    """Whether a character carries meaning between the one before it and the two after it."""
    category = unicodedata.category(character)
    if category[0] != "P" or character in SIGNS:
        return True
    if category in ("Ps", "Pe"):
        return not (before.isalnum() or after[0].isalnum())
    if character in DASHES:
        return not before.isalnum() and (after[0].isdigit() or after[0] == "." and after[1].isdigit())
    if character == ".":
        return after[0].isdigit() and (before.isdigit() or not before.isalnum())
    return character in ",:" and before.isdigit() and after[0].isdigit()


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
            before, after = name[: match.start()], name[match.end() :]
            if _unspaced(match[0]) or not (_ends_within(before, match[0]) or _goes_on(match[0], after)):
                return True
            start = match.start() + 1
        return False


def _ends_within(before: str, phrase: str) -> bool:
    """Whether the text before a phrase ends within its first word, or with the minus of its number."""
    minus = before[-1:] == "-" and phrase[0].isdigit() and not _in_word(before[-2:-1])
    return minus or _in_word(before[-1:])


def _goes_on(phrase: str, after: str) -> bool:
    """Whether the last word goes on after a phrase; C goes on in C++ and C#, longer words do not."""
    rest = after.lstrip("+#")
    named = len(phrase.rpartition(" ")[2]) == 1 and rest != after and not _in_word(rest[:1])
    return named or _in_word(after[:1])


def _in_word(character: str) -> bool:
    """Whether it is a letter, a mark or a digit of a script with spaces; nothing is none."""
    return unicodedata.category(character)[0] in "LMN" and not _unspaced(character) if character else False


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
