import csv
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spo.ingest import prompt_files as prompts

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
        ("p.json", "[1]", "entry 0"),
        ("p.json", "{", "line 1"),
        ("p.json", '{"a": 1}', "must be a list"),
        ("p.jsonl", '"ok"\n{"x": 1}', "line 2"),
        ("p.csv", "a,b\n1,2\n", "the header has no caption"),
        ("p.parquet", "no parquet", "parquet"),
        ("p.doc", "", "not .doc"),
    ],
)
def test_an_unreadable_row_names_file_and_place(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        prompts.read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_text_that_is_not_utf8_says_where(tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="byte 3"):
        prompts.read_prompts(tmp_path / "p.txt")


def written(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def refused(path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        prompts.read_prompts(path)
    line = str(error.value)
    assert "\n" not in line and path.name in line
    for word in words:
        assert word in line, line


def test_quotes_of_a_list_with_tabs_belong_to_its_prompts(tmp_path) -> None:
    """A reader of quoted fields would swallow the rows from the first quote to the second."""
    rows = ['"Hello" says a cat', "a dog", 'a sign that says "Hi"', '"quoted"']
    text = "Prompt\tCategory\n" + "".join(f"{row}\tAnimals\n" for row in rows)
    assert prompts.read_prompts(written(tmp_path / "p.tsv", text)) == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_quotes_of_a_csv_writer_are_removed(tmp_path, quoting, ending: str) -> None:
    rows = ['a sign that says "Hi"', "a\ttab", "plain"]
    frame = pd.DataFrame({"id": ["x", "y", "z"], "prompt": rows})
    frame.to_csv(tmp_path / "p.tsv", sep="\t", index=False, quoting=quoting, lineterminator=ending)
    assert prompts.read_prompts(tmp_path / "p.tsv") == rows


def test_quotes_that_may_be_either_are_refused(tmp_path) -> None:
    refused(written(tmp_path / "p.tsv", 'prompt\n"a cat\na dog\na bird"\n'), "line 4", "several")


TEXTS = st.lists(st.text(alphabet='ab", \t\n', min_size=1).filter(str.strip), min_size=1, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.sampled_from(["p.csv", "p.tsv"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_what_pandas_writes_is_read_or_refused(tmp_path, texts, name: str, quoting) -> None:
    gap = "," if name == "p.csv" else "\t"
    pd.DataFrame({"prompt": texts, "id": 1}).to_csv(tmp_path / name, sep=gap, index=False, quoting=quoting)
    try:
        assert prompts.read_prompts(tmp_path / name) == texts
    except ValueError as error:
        assert name == "p.tsv" and quoting == csv.QUOTE_MINIMAL and "may" in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet='ab" ', min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_a_list_without_quoting_is_read_or_refused(tmp_path, texts) -> None:
    """Except prompts that look exactly as a CSV writer would quote them."""
    written(tmp_path / "p.tsv", "prompt\tid\n" + "".join(f"{text}\t1\n" for text in texts))
    try:
        read = prompts.read_prompts(tmp_path / "p.tsv")
    except ValueError as error:
        assert "may" in str(error)
    else:
        unquoted = [t[1:-1].replace('""', '"') if t[0] == '"' and '""' in t[1:-1] else t for t in texts]
        assert read in (texts, unquoted)


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_a_row_of_another_length_is_refused_with_its_line(tmp_path, name: str) -> None:
    gap = "," if name == "p.csv" else "\t"
    text = f"prompt{gap}id\na cat{gap}1\n\na dog{gap} big{gap}2\n"
    refused(written(tmp_path / name, text), "line 4 has 3 fields, the header has 2")
    refused(
        written(tmp_path / name, f"id{gap}prompt\n1{gap}a cat\n2\n"), "line 3 has 1 fields, the header has 2"
    )


def test_an_unquoted_comma_does_not_cut_a_prompt(tmp_path) -> None:
    refused(written(tmp_path / "p.csv", "prompt\na cat, sleeping\n"), "line 2", "quotes")
    assert prompts.read_prompts(written(tmp_path / "p.csv", 'prompt\n"a cat, sleeping"\n')) == [
        "a cat, sleeping"
    ]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id;prompt\n1;a cat, a dog\n2;b\n", "utf-8"),  # spreadsheets where the comma is decimal
        ('id,prompt\r\n1,"a cat, a dog"\r\n2,b\r\n', "utf-8-sig"),
        ("id\tprompt\r\n1\ta cat, a dog\r\n2\tb\r\n", "utf-16"),  # "Unicode text"
        (' ID , Prompt \n1,"a cat, a dog"\n\n2,b\n', "utf-8"),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path, text: str, encoding: str) -> None:
    assert prompts.read_prompts(written(tmp_path / "p.csv", text, encoding)) == ["a cat, a dog", "b"]


@pytest.mark.parametrize("note", ["sep=;", '"sep=;"', "SEP=;", "\nsep=,", "sep=\t"])
def test_a_spreadsheet_s_note_of_its_separator_is_refused(tmp_path, note: str) -> None:
    refused(written(tmp_path / "p.csv", f"{note}\r\nid;prompt\r\n1;a cat\r\n"), "line 1", "remove it")
    refused(written(tmp_path / "p.tsv", f"{note}\nid\tprompt\n1\ta cat\n"), "line 1", "remove it")


def in_two_columns(folder, ending: str, names: tuple[str, str], texts: tuple[str, str]):
    """A list whose first row has one prompt in both columns, and whose second row has `texts`."""
    table = pd.DataFrame([("a fox", "a fox"), texts], columns=names)
    path = folder / f"p.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    elif ending in ("json", "jsonl"):
        table.to_json(path, orient="records", lines=ending == "jsonl")
    else:
        table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_columns_that_differ_are_refused_and_equal_ones_are_read(tmp_path, ending: str) -> None:
    for names in (("prompt", "caption"), ("Caption", "TEXT"), (" text ", "Prompt")):
        path = in_two_columns(tmp_path, ending, names, ("a cat", "a dog"))
        refused(path, "differ", names[0].strip(), names[1].strip())
        path = in_two_columns(tmp_path, ending, names, ("a cat", "a cat"))
        assert prompts.read_prompts(path) == ["a fox", "a cat"]
        refused(in_two_columns(tmp_path, ending, ("prompt", "Prompt "), ("a", "a")), "2 columns prompt")


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_a_column_that_says_nothing_contradicts_nothing(tmp_path, ending: str) -> None:
    for texts in (("a cat", None), (None, "a cat"), ("", "a cat")):
        path = in_two_columns(tmp_path, ending, ("prompt", "text"), texts)
        assert prompts.read_prompts(path) == ["a fox", "a cat"]


def test_a_column_of_a_parquet_file_that_holds_no_text_holds_no_prompts(tmp_path) -> None:
    table = pd.DataFrame({"prompt": ["a cat"], "text": [3]})
    table.to_parquet(tmp_path / "p.parquet")
    assert prompts.read_prompts(tmp_path / "p.parquet") == ["a cat"]
    table[["text"]].to_parquet(tmp_path / "p.parquet")
    refused(tmp_path / "p.parquet", "column text is int64", "must hold text")


def test_a_header_ends_at_line_feeds_and_carriage_returns_only(tmp_path) -> None:
    for end in "\n\r":
        text = end.join(("a\x85note;prompt", "1;a cat, sleeping", ""))
        assert prompts.read_prompts(written(tmp_path / "p.csv", text)) == ["a cat, sleeping"]


def test_lines_end_as_on_any_system(tmp_path) -> None:
    for text in ("a\nb\n", "a\r\nb\r\n", "a\rb"):
        assert prompts.read_prompts(written(tmp_path / "p.txt", text)) == ["a", "b"]
    assert prompts.read_prompts(written(tmp_path / "p.txt", "caf\u00e9\n", "utf-16")) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.csv", b"", ("is empty",)),
        ("p.csv", b"prompt,Prompt\na,b\n", ("2 columns prompt",)),
        ("p.csv", b'prompt\n"a" b\n', ("line 2",)),
        ("p.csv", b"prompt\na\0b\n", ("line 2", "NUL")),
        ("p.txt", "caf\u00e9".encode("latin-1"), ("byte 3", "UTF-8")),
        ("p.json", b'[{"caption": 5}]', ("entry 0", "caption is a int", "text")),
        ("p.json", b'[{"caption": ["a"]}]', ("entry 0", "list")),
        ("p.json", b"[null]", ("entry 0", "null")),
        ("p.json", b'{"0": {"prompt": "a"}}', ("must be a list",)),
        ("p.jsonl", b'{"caption": "a"}\n7\n', ("line 2", "int")),
        ("p.json", b'[{"caption": "a", "caption": "b"}]', ("'caption' twice",)),
        ("p.jsonl", b'{"caption": "a", "caption": "b"}', ("line 1", "'caption' twice")),
        ("p.csv", b'id, prompt\n1, "a cat"\n', ("line 2", "remove the space")),
        (
            "p.tsv",
            b'prompt\tid\nb\t1\n"a, b"\t2\n',
            ("line 3", ".jsonl"),
        ),  # of a spreadsheet, or all the prompt
        ("p.tsv", b'prompt\tid\n"STOP"\t1\n', ("line 2", ".jsonl")),
        ("p.tsv", b'prompt\tid\n"Go" on a sign\t1\nb\n', ("line 3 has 1 fields",)),
        ("p.txt.gz", b"", ("not .gz",)),
    ],
)
def test_a_file_that_is_not_a_list_of_prompts_is_refused(tmp_path, name: str, data: bytes, words) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, *words)


def test_a_folder_is_refused(tmp_path) -> None:
    (tmp_path / "p.csv").mkdir()
    refused(tmp_path / "p.csv", "a folder")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_columns_of_text_are_read_however_encoded(tmp_path, kind) -> None:
    values = ["a cat", None, "caf\u00e9"]
    column = (
        pa.array(values, pa.string()).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(values).dictionary_encode()
    )
    pq.write_table(pa.table({"caption": column}), tmp_path / "p.parquet")
    assert prompts.read_prompts(tmp_path / "p.parquet") == ["a cat", "", "caf\u00e9"]


@pytest.mark.parametrize("values", [[1, 2], [1.5], [True], [["a", "b"]], [{"text": "a"}]])
def test_columns_of_other_types_are_refused_by_their_type(tmp_path, values) -> None:
    column = pa.array(values)
    pq.write_table(pa.table({"caption": column}), tmp_path / "p.parquet")
    refused(tmp_path / "p.parquet", "column caption is", str(column.type)[:4])


def test_bytes_that_are_not_text_name_their_row(tmp_path) -> None:
    pq.write_table(pa.table({"caption": pa.array([b"a", b"caf\xe9"])}), tmp_path / "p.parquet")
    refused(tmp_path / "p.parquet", "row 1", "byte 3")
