"""Clean prompts, compute the keys that find duplicates, and refuse what no tokenizer encodes as text."""

import html
import re
import unicodedata
from collections.abc import Sequence

import regex

# Punctuation without a meaning. Signs have one (C# is not C, 1/2 is not 12), and so have a minus before a
# number, a mark between two digits or before a decimal, as in 3.5, 16:9 and .5, and brackets that enclose no
# word, as in :).
DIGIT = r"[\p{nt=De}\p{nt=Di}]"
WORD = r"[\p{L}\p{nt=De}\p{nt=Di}\p{nt=Nu}]"
SIGN = r"[#%\&@*/\\\u2030\u2031\u2032\u2033\u00a7\u00b6\u2020\u2021\u203b]"
MEANING = (
    rf"(?<!{WORD})[\-\u2013](?=\.?{DIGIT})"
    rf"|(?:(?<={DIGIT})|(?<!{WORD}))\.(?={DIGIT})"
    rf"|(?<={DIGIT})[,:](?={DIGIT})"
    rf"|(?<!{WORD})[\p{{Ps}}\p{{Pe}}](?!{WORD})"
)
EMPTY = regex.compile(rf"(?!{MEANING})[\p{{P}}--{SIGN}]", regex.VERSION1)
# Without a shape or a meaning: controls, soft hyphen, zero-width space, direction and byte order marks,
# annotations. An explicit list: joiners, variation selectors and tags stay, since emoji consist of them.
INVISIBLE = regex.compile(
    r"[[\p{Cc}\p{Cs}\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    r"--[\t-\r\x1c-\x1f\x85]]",  # these are spaces
    regex.VERSION1,
)

# Tokens that are not read as text: those of CLIP, open_clip, T5 and RoBERTa in any case, those of BERT and
# BLIP in upper case only, since brackets are weights in many prompts.
SPECIAL = re.compile(
    r"(?i:<\|\w+\|>|</?s>|<(?:pad|unk|mask|bos|eos|(?:start|end)_of_text|extra_id_\d+)>)"
    r"|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS|DEC|ENC)\]"
)


def clean(prompt: str) -> str:
    """Normalise to NFC without control and invisible characters, with single spaces between words."""
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", prompt)).split())


def exact_key(prompt: str) -> str:
    """The text that duplicates share: NFC, case folded, single spaces.

    Not NFKC: CO₂ and CO2, or x² and x2, are tokenized and drawn differently.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", clean(prompt)).casefold())


def key(prompt: str) -> str:
    """The text that near duplicates share: `exact_key` in one character width, without empty punctuation.

    Letters, marks, digits, symbols and signs of every script stay; of punctuation, what EMPTY leaves.
    """
    text = exact_key("".join(map(_normal_width, exact_key(prompt)))).replace("\u2212", "-")
    return " ".join(EMPTY.sub(" ", text).split()) or text


def _normal_width(character: str) -> str:
    """The ordinary form of full-width, half-width and small letters and signs."""
    if unicodedata.decomposition(character).startswith(("<wide>", "<narrow>", "<small>")):
        return unicodedata.normalize("NFKC", character)
    return character


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


def check(prompts: Sequence[str], source: str) -> None:
    """Refuse prompts that are empty or cannot be encoded; `source` is where they are from."""
    for number, prompt in enumerate(prompts, start=1):
        if reason := flaw(prompt) if clean(prompt) else "no text":
            raise ValueError(f"{source}: prompt {number} has {reason}; it cannot be encoded")
