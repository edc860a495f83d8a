"""Clean, deduplicate and order prompts."""

from __future__ import annotations

import difflib
import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spo.data.prompt_files import read_prompts, read_text

# Punctuation with a meaning: C# is not C, 1/2 is not 12.
SIGNS = frozenset("#%&@*/\\\u2030\u2031\u2032\u2033\u00a7\u00b6\u2020\u2021\u203b")
DASHES = frozenset("-\u2013")  # a minus, where a number follows
# Scripts without spaces between words, by the Unicode names of their characters.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
# Without a shape or a meaning: soft hyphen, zero-width space, direction and byte order marks, annotations. An
# explicit list: Python's table calls emoji newer than itself unassigned, and the tags of flags invisible.
INVISIBLE = frozenset(
    map(chr, (0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF, 0xFFF9, 0xFFFA, 0xFFFB))
) | frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2061, 0x2070))))

# Tokens that are not read as text: those of CLIP, open_clip, T5 and RoBERTa in any case, those of BERT and
# BLIP in upper case only, since brackets are weights in many prompts.
SPECIAL = re.compile(
    r"(?i:<\|\w+\|>|</?s>|<(?:pad|unk|mask|bos|eos|(?:start|end)_of_text|extra_id_\d+)>)"
    r"|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS|DEC|ENC)\]"
)


def clean(prompt: str) -> str:
    """Normalise to NFC without control and invisible characters, with single spaces between words.

    Joiners, variation selectors and tags stay: emoji consist of them.
    """
    text = "".join(" " if c.isspace() else c for c in prompt if c.isspace() or _visible(c))
    return " ".join(unicodedata.normalize("NFC", text).split())


def _visible(character: str) -> bool:
    return character not in INVISIBLE and unicodedata.category(character) not in ("Cc", "Cs")


def exact_key(prompt: str) -> str:
    """The text that duplicates share: NFC, case folded, single spaces.

    Not NFKC: CO₂ and CO2, or x² and x2, are tokenized and drawn differently.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", clean(prompt)).casefold())


def key(prompt: str) -> str:
    """The text that near duplicates share: `exact_key` in one character width, without empty punctuation.

    Letters, marks, digits, symbols and signs of every script stay. Of punctuation stay: the signs of SIGNS, a
    minus before a number, a mark between two digits or before a decimal, as in 3.5, 16:9 and .5, and brackets
    that enclose no word, as in :).
    """
    text = exact_key("".join(map(_normal_width, exact_key(prompt)))).replace("\u2212", "-")
    padded = f" {text}  "
    meaningful = "".join(
        c if _is_meaningful(padded[i], c, padded[i + 2 : i + 4]) else " " for i, c in enumerate(text)
    )
    return " ".join(meaningful.split()) or text


def _normal_width(character: str) -> str:
    """The ordinary form of full-width, half-width and small letters and signs."""
    if unicodedata.decomposition(character).startswith(("<wide>", "<narrow>", "<small>")):
        return unicodedata.normalize("NFKC", character)
    return character


def _is_meaningful(before: str, character: str, after: str) -> bool:
    """Whether a character has a meaning between the one before it and the two after it."""
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
    """Why a prompt cannot be encoded; None if it can.

    A special token is refused in every spelling that a tokenizer's own cleaning makes one (open_clip replaces
    HTML entities, full-width letters and ligatures): the text behind it would not count.
    """
    for i, character in enumerate(prompt):
        if "\ud800" <= character <= "\udfff":
            return f"half of a surrogate pair at character {i}"
    if "\0" in prompt:
        return "a NUL character"
    text = prompt
    while (plain := html.unescape(text)) != text:
        text = plain
    token = SPECIAL.search(unicodedata.normalize("NFKC", clean(text)))
    return f"the special token {token[0]} of a tokenizer" if token else None


@dataclass
class Selection:
    """Cleaned prompts, and the rejected ones by reason; every prompt read is in one of the two."""

    prompts: list[str]
    rejected: Counter[str] = field(default_factory=Counter)
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (number in the list, reason)


@dataclass(frozen=True)
class BlockList:
    """Words and phrases that no prompt may contain."""

    pattern: re.Pattern[str]

    @classmethod
    def load(cls, path: str | Path) -> BlockList:
        """Read a text file with one word or phrase per line; empty lines and comments (#) are skipped.

        Raises:
            ValueError: no such file, or an empty list.
        """
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
    """Check that every word of the prompts is in the list at `path` (one word per line).

    Raises:
        ValueError: the first prompt with unknown words, and the nearest known words.
    """
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
