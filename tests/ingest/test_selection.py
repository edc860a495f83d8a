import pytest

from spo.data import prompts
from spo.ingest import selection


def test_duplicates_are_the_same_but_for_case_space_and_composition() -> None:
    chosen = selection.select(["Caf\u00e9  au lait", "CAFE\u0301 au lait"], len, 100)
    assert chosen.prompts == ["Caf\u00e9 au lait"] and chosen.rejected == {"duplicate": 1}


def test_half_of_a_surrogate_pair_is_rejected_by_name() -> None:
    chosen = selection.select(["a cat", "a \ud83d dog", "a\0b"], len, 100)
    assert chosen.prompts == ["a cat"] and chosen.rejected == {"broken_text": 2}


def test_the_block_list_matches_complete_words_and_scripts_without_spaces(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("# words\nrude word\nC++\n\u732b\n", encoding="utf-8")
    blocked = selection.block_list(tmp_path / "b.txt")
    for text in (
        "a rude word!",
        "(rude word)",
        "#rude word",
        "RUDE-WORD",
        "in c++ style",
        "\u9ed2\u732b\u3068",
    ):
        assert blocked.search(prompts.key(text)), text
    for text in ("a crude word", "rude words", "c style", "\u72ac"):
        assert not blocked.search(prompts.key(text)), text


def test_a_phrase_is_found_where_a_longer_one_is_part_of_a_word(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("gore\ngore like\n")
    assert selection.block_list(tmp_path / "b.txt").search(prompts.key("gore likes"))


def test_signs_at_a_name_or_a_number_belong_to_it(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("C\n5\ngore\n")
    blocked = selection.block_list(tmp_path / "b.txt")
    for text in ("C", "a C, book", "5 dogs", "3-5 dogs", "gore++", "gore-like", "gore\u732b", "(gore)"):
        assert blocked.search(prompts.key(text)), text
    for text in ("C++", "C#", "-5 degrees", "allegore", "gores"):
        assert not blocked.search(prompts.key(text)), text


def test_every_prompt_is_selected_or_counted() -> None:
    raw = ["a b", "A, b", "a  b", "", "c", "one two three four", "forbidden one"]
    chosen = selection.select(raw, lambda p: len(p.split()), 3, [prompts.key("Forbidden: one")])
    assert chosen.prompts == ["a b", "c"]
    assert chosen.rejected == {
        "duplicate": 1,
        "near_duplicate": 1,
        "empty": 1,
        "too_long": 1,
        "elsewhere": 1,
    }
    assert len(chosen.prompts) + chosen.rejected.total() == len(raw)


def test_the_order_depends_on_content_and_seed_alone() -> None:
    lines = [f"prompt {i}" for i in range(50)]
    assert selection.by_hash(lines, 1) == selection.by_hash(lines[::-1], 1) != selection.by_hash(lines, 2)
    fewer = [line for line in selection.by_hash(lines, 1) if line != "prompt 7"]
    assert selection.by_hash([line for line in lines if line != "prompt 7"], 1) == fewer


def test_words_outside_the_vocabulary_are_named_with_a_nearest_one(tmp_path) -> None:
    (tmp_path / "v.txt").write_text("a\nred\ncircle\n")
    selection.check_vocabulary(["A red circle"], tmp_path / "v.txt")
    with pytest.raises(ValueError, match="'cirkle'.*circle"):
        selection.check_vocabulary(["a red cirkle"], tmp_path / "v.txt")
