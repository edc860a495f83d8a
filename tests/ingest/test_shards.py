"""Shards as they occur in practice: images, captions and labels in columns of many types."""

import base64
import io
import json
from decimal import Decimal

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spo import config
from spo.ingest import sources
from spo.stages import pairs as pairs_stage


def encoded(kind: str = "PNG", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (9, 99, 199)).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded()
CODED = base64.b64encode(PNG).decode()


def table(rows: int = 2, **columns) -> pa.Table:
    content = {
        "caption": ["a cat", "a dog"][:rows],
        "jpg_0": [PNG] * rows,
        "jpg_1": [PNG] * rows,
        "label_0": [1.0, 0.0][:rows],
        "label_1": [0.0, 1.0][:rows],
    }
    return pa.table(content | columns)


def read(folder, **columns) -> list:
    """Each row's pair, or the reason of its rejection."""
    pq.write_table(table(**columns), folder / "a.parquet")
    rows = list(sources.read_rows(folder / "a.parquet"))
    return [pair if reason is None else reason.reason for pair, reason in rows]


IMAGES = {
    "large_binary": pa.array([PNG] * 2, pa.large_binary()),
    "binary_view": pa.array([PNG] * 2, pa.binary_view()),
    "fixed": pa.array([PNG] * 2, pa.binary(len(PNG))),
    "dictionary": pa.array([PNG] * 2).dictionary_encode(),
    "struct": pa.array([{"bytes": PNG, "path": "x.png"}, {"bytes": PNG, "path": None}]),
    "struct_no_path": pa.array([{"bytes": PNG, "path": None}] * 2),
    "uint8": pa.array([list(PNG)] * 2, pa.list_(pa.uint8())),
    "int64": pa.array([list(PNG)] * 2),
    "fixed_list": pa.array([list(PNG)] * 2, pa.list_(pa.uint8(), len(PNG))),
    "base64": pa.array([CODED, "\n".join(CODED[i : i + 76] for i in range(0, len(CODED), 76))]),
    "data_url": pa.array([f"data:image/png;base64,{CODED}", CODED.rstrip("=")], pa.large_string()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_from_every_type_of_column(tmp_path, name: str) -> None:
    rows = read(tmp_path, jpg_0=IMAGES[name])
    assert [pair.image_0 for pair in rows] == [PNG, PNG]


def test_an_image_without_bytes_is_the_file_beside_the_shard(tmp_path) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/images/x.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    names = ["images/x.png", "../secret.png"]
    rows = read(tmp_path / "data", jpg_0=[{"bytes": None, "path": name} for name in names])
    assert rows[0].image_0 == PNG
    assert rows[1] == "jpg_0 has no bytes, and path '../secret.png' leads out of the data set"
    rows = read(tmp_path / "data", jpg_0=[{"bytes": None, "path": n} for n in ("gone.png", None)])
    assert rows[0].endswith("path 'gone.png': no such image")
    assert rows[1] == "jpg_0 is missing: it has neither bytes nor a path"


def test_an_image_without_bytes_in_a_remote_store_is_rejected() -> None:
    with fsspec.filesystem("memory").open("/paths/a.parquet", "wb") as file:
        pq.write_table(table(jpg_0=[{"bytes": None, "path": "x.png"}] * 2), file)
    reasons = [reason.reason for _, reason in sources.read_rows("memory://paths/a.parquet")]
    assert reasons == ["jpg_0 has a path without bytes; images by path need shards in a local folder"] * 2


CAPTIONS = ["a café", "a dog"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([c.encode() for c in CAPTIONS]),
        pa.array([c.encode() for c in CAPTIONS], pa.large_binary()),
        pa.array(CAPTIONS).dictionary_encode(),
        pa.array(CAPTIONS, pa.large_string()),
        pa.array(CAPTIONS, pa.string_view()),
        pd.Series(CAPTIONS, dtype="category"),
    ],
    ids=["binary", "large_binary", "dictionary", "large_string", "string_view", "category"],
)
def test_captions_are_read_from_every_type_of_text(tmp_path, column) -> None:
    assert [pair.caption for pair in read(tmp_path, caption=column)] == CAPTIONS
    assert list(sources.read_captions(tmp_path / "a.parquet")) == CAPTIONS


@pytest.mark.parametrize("text", [True, False])
def test_a_caption_that_is_not_utf8_rejects_its_row_only(tmp_path, text: bool) -> None:
    column = pa.array([b"a\xe9", b"a dog"])
    if text:
        column = pa.StringArray.from_buffers(2, column.buffers()[1], column.buffers()[2])
    rows = read(tmp_path, caption=column)
    assert rows[0] == "caption is not UTF-8 text at byte 1" and rows[1].caption == "a dog"
    assert list(sources.read_captions(tmp_path / "a.parquet")) == ["", "a dog"]


@pytest.mark.parametrize(
    ("one", "zero", "half"),
    [
        (pa.array([Decimal("1.0")] * 2), pa.array([Decimal("0.0")] * 2), pa.array([Decimal("0.5")] * 2)),
        (pa.array([1, 1], pa.int8()), pa.array([0, 0], pa.uint64()), None),
        (pa.array([True] * 2), pa.array([False] * 2), None),
        (pa.array(["1", " 1.0"]), pa.array(["0", "0.0"]), pa.array(["0.5", ".5"])),
        *(
            tuple(pa.array(np.full(2, v, kind)) for v in (1, 0, 0.5))
            for kind in (np.float16, np.float32, np.float64)
        ),
    ],
    ids=["decimal", "int", "bool", "text", "float16", "float32", "float64"],
)
def test_labels_are_read_by_value(tmp_path, one, zero, half) -> None:
    assert [(p.label_0, p.label_1) for p in read(tmp_path, label_0=one, label_1=zero)] == [(1, 0)] * 2
    if half is not None:
        assert [p.label_0 for p in read(tmp_path, label_0=half, label_1=half)] == [0.5] * 2


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"label_0": [float("nan")] * 2}, "label_0 is NaN; must be a finite number"),
        ({"label_1": [None, 1.0]}, "label_1 is missing"),
        ({"label_0": ["tie", "1"]}, "label_0 is 'tie' (str); must be a number"),
        ({"has_label": ["maybe", "true"]}, "has_label is 'maybe' (str); must be true or false"),
        ({"has_label": ["false", "true"]}, "has_label is false"),
        ({"has_label": [0, 1]}, "has_label is false"),
        (
            {"num_example_per_prompt": ["many", "2"]},
            "num_example_per_prompt is 'many' (str); must be a number",
        ),
        (
            {"num_example_per_prompt": [float("nan"), 1]},
            "num_example_per_prompt is NaN; must be a finite number",
        ),
        ({"jpg_0": [None, PNG]}, "jpg_0 is missing"),
        ({"jpg_0": [b"", PNG]}, "jpg_0: not a readable image (0 bytes)"),
        ({"jpg_0": [[300, 1], [1, 2]]}, "jpg_0 is a list whose values are not integers from 0 to 255"),
        ({"jpg_0": [[1, None], [1, 2]]}, "jpg_0 is a list whose values are not integers from 0 to 255"),
        ({"jpg_0": [[1, 2], [1, 2]]}, "jpg_0: not a readable image (neither JPEG, PNG nor WebP)"),
        (
            {"jpg_0": ["https://x.org/1.png", CODED]},
            "jpg_0 is text, but not a base64-encoded image: 'https://x",
        ),
        ({"jpg_0": ["data:image/svg+xml,<svg/>", CODED]}, "jpg_0 is a data: URL without base64"),
    ],
)
def test_a_bad_value_is_rejected_with_the_true_reason(tmp_path, columns, reason: str) -> None:
    assert read(tmp_path, **columns)[0].startswith(reason)


@pytest.mark.parametrize("column", [pa.array([Decimal("2.0")] * 2), ["2", "2.0"], [2, 2]])
def test_the_number_of_examples_is_read_by_value(tmp_path, column) -> None:
    assert [pair.weight for pair in read(tmp_path, num_example_per_prompt=column)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"jpg_0": pd.to_datetime(["2026-01-01"] * 2)}, r"column jpg_0 is timestamp.*encoded images: binary"),
        ({"jpg_1": [[[[1, 2, 3]]]] * 2}, "column jpg_1 is list<element: list<element: list"),
        ({"jpg_0": [{"url": "x"}] * 2}, "column jpg_0 is struct<url: string>"),
        ({"jpg_0": [None, None]}, "column jpg_0 is null in every row"),
        ({"caption": [1, 2]}, "column caption is int64; it must hold text"),
        ({"label_0": [[1.0], [0.0]]}, "column label_0 is list<element: double>; it must hold numbers"),
        ({"label_0": [b"1", b"0"]}, "column label_0 is binary"),
        ({"num_example_per_prompt": [True, False]}, "column num_example_per_prompt is bool"),
    ],
)
def test_a_column_of_another_type_is_refused_once(tmp_path, columns, message: str) -> None:
    with pytest.raises(ValueError, match=f"a.parquet: {message}") as error:
        read(tmp_path, **columns)
    assert "\n" not in str(error.value)


def test_an_empty_shard_has_no_rows_whatever_its_types(tmp_path) -> None:
    pq.write_table(table(0, caption=pa.nulls(0), jpg_0=pa.nulls(0)), tmp_path / "a.parquet")
    assert list(sources.read_rows(tmp_path / "a.parquet")) == []


def test_a_duplicate_column_is_refused(tmp_path) -> None:
    pq.write_table(table().append_column("caption", pa.array(["x", "y"])), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: 2 columns are named caption"):
        list(sources.read_rows(tmp_path / "a.parquet"))


def damaged() -> list[bytes]:
    png, jpeg, webp = (encoded(kind, 40) for kind in ("PNG", "JPEG", "WEBP"))
    truncated = [data[: len(data) // 2] for data in (png, jpeg, webp)]
    signatures = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 "]
    zeroed = [data[:30] + bytes(len(data) - 30) for data in (png, jpeg)]
    return [b"", b"<html>", encoded("GIF"), encoded("TIFF"), *truncated, *signatures, *zeroed]


def test_damaged_images_give_the_same_reasons_in_each_run(tmp_path) -> None:
    n, bad = 40, damaged()
    rows = {"caption": [f"c {i}" for i in range(n)], "jpg_0": [*bad, *[PNG] * (n - len(bad))]}
    rows |= {"jpg_1": [encoded(size=9)] * n, "label_0": [1.0] * n, "label_1": [0.0] * n}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in/a.parquet")
    section = config.Pairs(source=str(tmp_path / "in"), validation_fraction=0.3, max_bad_fraction=1)
    tables = []
    for name in "ab":
        pairs_stage.prepare(section, tmp_path / name)
        tables.append((tmp_path / name / "rejected.csv").read_bytes())
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 1 + len(bad)
    assert b"0x" not in tables[0] and str(tmp_path).encode() not in tables[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "a \ud83d cat"}, "prompt has half of a surrogate pair at character 2"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": 5}, "prompt is 5 (int); must be text"),
        ({"human_preference": ["left", "right"]}, "human_preference is 'left' (str); must be a number"),
        ({"human_preference": [None, 1]}, "human_preference is missing"),
        ({"human_preference": 1}, "human_preference is 1; must be a list of two"),
        ({"human_preference": [float("nan"), 0]}, "human_preference is NaN"),
        ({"file_path": "x.png"}, "file_path is 'x.png'; must be a list of two"),
        ({"file_path": ["x.png", None]}, "file_path None is not a file name"),
        ({"file_path": ["x.png", "\ud83d.png"]}, r"file_path '\ud83d.png' is not a file name"),
        ({"file_path": ["x.png", "/etc/passwd"]}, "file_path '/etc/passwd' leads out of the data set"),
        ({"file_path": ["x.png", "n" * 300]}, "file_path 'nnn"),
    ],
)
def test_an_entry_of_hpd_is_rejected_with_the_true_reason(tmp_path, change, reason: str) -> None:
    assert reason in entries(tmp_path, change)[0]


def test_an_entry_whose_prompt_and_caption_differ_is_rejected(tmp_path) -> None:
    with pytest.raises(ValueError, match="train.json: entry 0: prompt and caption differ"):
        entries(tmp_path, {"caption": "a dog"})
    ((pair, rejected),) = sources.read_rows(tmp_path / "train.json")
    assert pair is None and "prompt and caption differ" in rejected.reason


def test_an_entry_with_a_key_twice_is_refused(tmp_path) -> None:
    entry = (
        '{"prompt": "a cat", "prompt": "a dog", "file_path": ["x.png", "x.png"], "human_preference": [1, 0]}'
    )
    (tmp_path / "train.json").write_text(f"[{entry}]")
    with pytest.raises(
        ValueError, match="train.json: an object has the key 'prompt' twice, with 'a cat' and 'a dog'"
    ):
        list(sources.read_rows(tmp_path / "train.json"))


def test_a_row_whose_caption_and_prompt_differ_is_rejected(tmp_path) -> None:
    first, second = read(tmp_path, prompt=["a cat", "another"])
    assert first.caption == "a cat" and "caption and prompt differ" in second
    with pytest.raises(ValueError, match="a.parquet: row 1: caption and prompt differ"):
        list(sources.read_captions(tmp_path / "a.parquet"))


def test_a_row_without_a_prompt_beside_its_caption_is_read(tmp_path) -> None:
    for empty in (None, ""):
        first, second = read(tmp_path, prompt=[empty, "another"])
        assert first.caption == "a cat" and "caption and prompt differ" in second
        assert next(sources.read_captions(tmp_path / "a.parquet")) == "a cat"


def test_a_caption_with_a_special_token_is_rejected_as_one_with_nul_is(tmp_path) -> None:
    token, nul = read(tmp_path, caption=["a <|endoftext|> b", "a\0b"])
    assert token == "caption has the special token <|endoftext|> of a tokenizer"
    assert nul == "caption has a NUL character"


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"human_preference": [0.0, 1.0]}, 0),
        ({"human_preference": ["1", "0"]}, 1),
        ({"human_preference": [True, False]}, 1),
        ({"human_preference": [1.0, "1"]}, 0.5),
        ({"file_path": ["./x.png", "train\\x.png"]}, 1),
    ],
)
def test_an_entry_of_hpd_is_read_by_value(tmp_path, change, label: float) -> None:
    assert entries(tmp_path, change)[0].label_0 == label


def entries(folder, change: dict) -> list:
    (folder / "train").mkdir()
    (folder / "x.png").write_bytes(PNG)
    (folder / "train/x.png").write_bytes(PNG)
    entry = {"prompt": "a cat", "file_path": ["x.png", "x.png"], "human_preference": [1, 0]} | change
    (folder / "train.json").write_text(json.dumps([entry]))
    assert len(list(sources.read_captions(folder / "train.json"))) == 1
    rows = sources.read_rows(folder / "train.json")
    return [pair if reason is None else reason.reason for pair, reason in rows]
