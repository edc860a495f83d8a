import io
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spo.data import pairs
from spo.ingest import shards, sources
from spo.ingest.selection import is_validation
from spo.types import PreferencePair


def jpg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def row(i: int, **changes) -> dict:
    return {
        "caption": f"caption {i}",
        "jpg_0": jpg(i % 200),
        "jpg_1": jpg(i % 200 + 50),
        "label_0": 1.0,
        "label_1": 0.0,
        "has_label": True,
        "num_example_per_prompt": 2,
        "model_0": "ignored",
    } | changes


def write(folder, rows, name="train-00000.parquet") -> None:
    pd.DataFrame(rows).to_parquet(folder / name)


def test_rows_come_back_as_pairs_with_their_weight(tmp_path) -> None:
    write(tmp_path, [row(0), row(1, label_0=0.5, label_1=0.5, num_example_per_prompt=4)])
    read = [p for p, _ in sources.read_rows(tmp_path)]
    assert [(p.caption, p.label_0, p.weight) for p in read] == [
        ("caption 0", 1, 0.5),
        ("caption 1", 0.5, 0.25),
    ]
    assert read[0].image_0 == jpg(0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jpg_1": b"truncated"}, "jpg_1: not a readable image"),
        ({"jpg_0": None}, "jpg_0 is missing"),
        ({"caption": "  "}, "caption is empty"),
        ({"label_0": 0.7}, "labels are 0.7"),
        ({"label_0": float("nan")}, "label_0 is missing"),
        ({"has_label": False}, "has_label is false"),
        ({"num_example_per_prompt": 0}, "num_example_per_prompt is 0"),
    ],
)
def test_bad_rows_are_rejected_with_shard_row_and_reason(tmp_path, changes, reason) -> None:
    write(tmp_path, [row(0), row(1, **changes), row(2)])
    rows = list(sources.read_rows(tmp_path))
    assert [p is not None for p, _ in rows] == [True, False, True]
    rejected = rows[1][1]
    assert (rejected.shard, rejected.row) == ("train-00000.parquet", 1) and reason in rejected.reason


def test_files_that_are_not_shards_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no .parquet shards"):
        shards.find(tmp_path)
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(ValueError, match="x.parquet: not a readable parquet"):
        list(sources.read_rows(tmp_path))
    pd.DataFrame({"caption": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column jpg_0"):
        list(sources.read_rows(tmp_path))


def test_shards_are_written_in_order_and_none_is_lost(tmp_path) -> None:
    write(tmp_path, [row(i) for i in range(7)])
    writer = pairs.ShardWriter(tmp_path / "out", 3)
    for pair, _ in sources.read_rows(tmp_path / "train-00000.parquet"):
        writer.add(pair)
    writer.close()
    assert [p.name for p in pairs.shards(tmp_path / "out")] == [f"{i:05d}.parquet" for i in range(3)]
    assert [p.caption for p in pairs.read_pairs(tmp_path / "out")] == [f"caption {i}" for i in range(7)]
    assert writer.count == 7 and writer.labels == {"decided": 7}


def test_shards_are_bounded_by_bytes_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "SHARD_BYTES", 250)
    writer = pairs.ShardWriter(tmp_path, 4)
    written = [
        PreferencePair(f"prompt {i}", bytes(n), bytes(n), 1.0, 0.0)
        for i, n in enumerate((40, 50, 60, 500, 1, 2, 3, 4, 5))
    ]
    for pair in written:
        writer.add(pair)
    writer.close()
    shards = [pq.ParquetFile(path).metadata.num_rows for path in sorted(tmp_path.glob("*.parquet"))]
    assert shards == [3, 1, 4, 1]  # 300 bytes, 1000 bytes, four rows, the rest
    assert list(pairs.read_pairs(tmp_path)) == written


def test_the_split_is_by_caption_and_stable() -> None:
    captions = [f"caption {i}" for i in range(4000)]
    chosen = [is_validation(c, 0.15) for c in captions]
    assert abs(sum(chosen) / 4000 - 0.15) < 0.02
    assert chosen == [is_validation(c, 0.15) for c in captions]
    assert not any(is_validation(c, 0.0) for c in captions)
    assert all(is_validation(c, 1.0) for c in captions)


def test_all_spellings_of_a_prompt_are_in_one_part() -> None:
    for i in range(50):
        spellings = (f"a cat {i}", f"A  Cat {i} ", f"a cat, {i}.", f"a\u200b cat\r{i}")
        assert len({is_validation(c, 0.5) for c in spellings}) == 1


def test_labels_by_a_scorer_are_read_with_their_facts(tmp_path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"pseudo_labels": {"ties": 1}}))
    (tmp_path / "labels.csv").write_text("gap,label_0\n0.3,1\n-0.2,0\n0.01,0.5\n")
    labels, facts = pairs.read_labels(tmp_path, 3)
    assert labels.tolist() == [1, 0, 0.5] and labels.dtype == torch.float32 and facts == {"ties": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "labels.csv: no labels of preference.labels there; run `make repro`"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "labels.csv: 2 labels for 3 training pairs"),
        (lambda text: text + "0.1,1\n", "labels.csv: 4 labels for 3 training pairs"),
        (lambda text: text.replace("0.5", "0.7"), "or one that is not 0, 0.5 or 1; run `make repro`"),
        (lambda text: text.replace(",0.5", ","), "or one that is not 0, 0.5 or 1; run `make repro`"),
        (lambda text: text.replace("label_0", "label"), "labels.csv: a damaged table"),
        (lambda text: "", "labels.csv: a damaged table"),
    ],
)
def test_labels_that_do_not_fit_the_pairs_are_one_line(tmp_path, change, message) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"pseudo_labels": {"ties": 1}}))
    text = change("gap,label_0\n0.3,1\n-0.2,0\n0.01,0.5\n")
    if text is not None:
        (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        pairs.read_labels(tmp_path, 3)
    assert message in str(error.value) and "\n" not in str(error.value)
