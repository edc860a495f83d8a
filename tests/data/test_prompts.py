import json

import pandas as pd
import pytest

from spo.data import prompts

LINES = ["a red circle", "a blue star", "sand, and «more»"]


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, ending: str) -> None:
    path, rows = tmp_path / f"p.{ending}", [{"caption": line, "id": i} for i, line in enumerate(LINES)]
    frame = pd.DataFrame(rows)
    if ending == "txt":
        path.write_text("\n".join(LINES))
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.rename(columns={"caption": "Prompt"}).to_csv(path, sep="\t" if ending == "tsv" else ",")
    assert prompts.read_prompts(path) == LINES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "[1]", "item 0"),
        ("p.json", "{", "line 1"),
        ("p.json", '{"a": 1}', "must be a list"),
        ("p.jsonl", '"ok"\n{"x": 1}', "line 2"),
        ("p.csv", "a,b\n1,2\n", "the header has no caption"),
        ("p.parquet", "no parquet", "parquet"),
        ("p.doc", "", "not .doc"),
    ],
)
def test_what_cannot_be_read_names_file_and_place(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        prompts.read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_text_that_is_not_utf8_says_where(tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="byte 3"):
        prompts.read_prompts(tmp_path / "p.txt")


def test_cleaning() -> None:
    assert prompts.clean("  cafe\u0301\u00a0 au\tlait\u200b\x07 ") == "caf\u00e9 au lait"
    assert prompts.clean("a family \U0001f468\u200d\U0001f469") == "a family \U0001f468\u200d\U0001f469"


def test_near_duplicates_share_a_key() -> None:
    assert prompts.key("A  Red-Circle, CAFÉ!") == prompts.key("a red circle cafe") == "a red circle cafe"
    assert prompts.key("a red circle") != prompts.key("a red circles")


def test_every_prompt_is_kept_or_counted() -> None:
    raw = ["a b", "A, b", "", "c", "one two three four", "forbidden one"]
    kept = prompts.select(raw, lambda p: len(p.split()), 3, [prompts.key("Forbidden: one")])
    assert kept.prompts == ["a b", "c"]
    assert kept.left_out == {"duplicate": 1, "empty": 1, "too_long": 1, "elsewhere": 1}
    assert len(kept.prompts) + kept.left_out.total() == len(raw)


def test_the_order_depends_on_content_and_seed_alone() -> None:
    lines = [f"prompt {i}" for i in range(50)]
    assert prompts.by_hash(lines, 1) == prompts.by_hash(lines[::-1], 1) != prompts.by_hash(lines, 2)
    fewer = [line for line in prompts.by_hash(lines, 1) if line != "prompt 7"]
    assert prompts.by_hash([line for line in lines if line != "prompt 7"], 1) == fewer


def test_words_outside_the_vocabulary_are_named_with_a_near_one(tmp_path) -> None:
    (tmp_path / "v.txt").write_text("a\nred\ncircle\n")
    prompts.check_vocabulary(["A red circle"], tmp_path / "v.txt")
    with pytest.raises(ValueError, match="'cirkle'.*circle"):
        prompts.check_vocabulary(["a red cirkle"], tmp_path / "v.txt")
