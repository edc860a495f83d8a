import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo.data import prompts
from spo.ingest import selection


def test_cleaning() -> None:
    assert prompts.clean("  cafe\u0301\u00a0 au\tlait\u200b\x07 ") == "caf\u00e9 au lait"
    assert prompts.clean("a family \U0001f468\u200d\U0001f469") == "a family \U0001f468\u200d\U0001f469"


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f466",  # a family, by joiners
        "\u2764\ufe0f",
        "\u845b\U000e0100",  # a variant of a Han character
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag, by tags
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a non-joiner
        "\U0001fae8",
    ],
)
def test_cleaning_preserves_joiners_and_marks_of_emoji_and_scripts(text: str) -> None:
    assert prompts.clean(text) == text


def test_cleaning_composes_across_removed_characters() -> None:
    assert prompts.clean("e\u200b\u0301") == "\u00e9"


@pytest.mark.parametrize("end", "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
def test_a_clean_prompt_is_one_line_to_every_reader(end: str) -> None:
    assert prompts.clean(f"a{end}cat{end}").splitlines() == ["a cat"]
    assert prompts.key(f"A{end}cat") == prompts.key("a cat")


def test_words_in_lower_case_are_their_own_key() -> None:
    words = "a small blue triangle at the right on sand"
    assert prompts.key(words) == words == prompts.exact_key(words)


def test_near_duplicates_share_a_key() -> None:
    assert prompts.key("A  Red-Circle, CAFÉ!") == prompts.key("a red circle café") == "a red circle café"
    assert prompts.key("a red circle") != prompts.key("a red circles")
    assert prompts.key("a large red circle on sand") == "a large red circle on sand"
    assert prompts.key("\uff21 \u201cquoted\u201d cat.") == "a quoted cat"  # full width
    assert prompts.key("?!") == "?!"  # nothing but punctuation is still something


ENGLAND, SCOTLAND = (
    "\U0001f3f4" + "".join(chr(0xE0000 + ord(c)) for c in name) + "\U000e007f" for name in ("gbeng", "gbsct")
)
DIFFERENT = [
    ("C", "C++", "C#"),
    ("5 degrees", "-5 degrees", "\u22125.5 degrees"),
    ("3.5 mm", "35 mm", "3 5 mm"),
    ("16:9", "16 9", "169"),
    ("1/2", "12", "1 2"),
    ("\u0e01\u0e32", "\u0e01\u0e48\u0e32", "\u0e01\u0e49\u0e32"),  # Thai: tone marks
    ("\u304b", "\u304c"),  # Japanese: ka, ga
    ("b\u00e1n", "b\u00e0n", "b\u1ea3n", "ban"),  # Vietnamese: tones
    ("\u0915\u093f", "\u0915\u0940", "\u0915"),  # Hindi: vowel signs
    ("\u0643\u064e\u062a\u064e\u0628", "\u0643\u062a\u0628"),  # Arabic: vowel marks
    ("\U0001f600", "\U0001f622", "\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"),
    ("a $ sign", "a \u20ac sign", "a sign"),
    ("CO2", "CO\u2082"),
    ("x2", "x\u00b2", "x \u00bd"),
    (".5 mm", "5 mm", "-.5 mm", "\u20135 mm"),  # en dash as a minus
    ("a face :)", "a face :(", "a face"),
    ("5\u2032", "5\u2033", "5\u2030", "\u00a75", "5"),
    ("\u2764", "\u2764\ufe0f"),
    (ENGLAND, SCOTLAND, "\U0001f3f4"),
    ("\U0001fae8", "\U0001fabf"),  # younger than the table of Python 3.11
    ("\uace0\uc591\uc774", "\uace0\uc591\uc774\uac00"),  # Korean: with a particle
]


@pytest.mark.parametrize("texts", DIFFERENT)
def test_prompts_that_differ_in_letters_marks_or_signs_are_different(texts) -> None:
    assert len({prompts.key(text) for text in texts}) == len(texts)
    assert len(selection.select(texts, len, 100).prompts) == len(texts)
    for text in texts:  # an evaluation prompt strikes itself from training, not the others
        rest = selection.select(texts, len, 100, [prompts.key(text)])
        assert rest.rejected == {"elsewhere": 1}


@given(
    st.lists(st.text(alphabet=st.characters(categories=["L", "M", "N", "S", "Zs"]), min_size=1), max_size=8)
)
def test_prompts_that_differ_after_normalisation_and_case_are_different(texts) -> None:
    chosen = selection.select(texts, lambda prompt: 1, 1)
    different = {prompts.key(text) for text in texts if prompts.clean(text)}
    assert {prompts.key(prompt) for prompt in chosen.prompts} == different
    assert len(chosen.prompts) + chosen.rejected.total() == len(texts)
    assert all(
        prompts.clean(p) == p and prompts.key(prompts.key(p)) == prompts.key(p) for p in chosen.prompts
    )


@pytest.mark.parametrize(
    "token",
    (
        "<|endoftext|>",
        "<|StartOfText|>",
        "<end_of_text>",
        "<START_OF_TEXT>",
        "&lt;end_of_text&gt;",
        "&amp;lt;|endoftext|&amp;gt;",
        "\uff1cend_of_text\uff1e",
        "<\ufb06art_of_text>",
        "<|end\u200boftext|>",
        "[CLS]",
        "[SEP]",
        "[ENC]",
        "</s>",
        "<pad>",
        "<extra_id_12>",
    ),
)
def test_a_special_token_is_a_flaw_in_every_spelling(token: str) -> None:
    assert "special token" in (prompts.flaw(f"a red circle {token} above a star") or "")
    assert "special token" in (prompts.flaw(f"a{token}") or "")
    assert selection.select(["a cat", f"a {token} dog"], len, 100).rejected == {"broken_text": 1}


@pytest.mark.parametrize(
    "text",
    (
        "a <b> tag",
        "I <3 cats",
        "[mask] of a fox",
        "(red:1.2) [blue]",
        "<lora:x:1>",
        "a | b",
        "AT&T",
        "x < y > z",
    ),
)
def test_brackets_of_other_meanings_are_no_flaw(text: str) -> None:
    assert prompts.flaw(text) is None
