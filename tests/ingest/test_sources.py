"""Preference data and prompts as the stages prepare them: every row is used, filtered or rejected."""

import csv
import io
import json
import random
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from spo import config
from spo.data import pairs
from spo.ingest import sources
from spo.ingest.manifest import manifest
from spo.stages import pairs as pairs_stage
from spo.stages import prompts as prompts_stage


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def frame(rows: int, bad: int = 0, ties: int = 0) -> pd.DataFrame:
    table = pd.DataFrame({"caption": [f"caption {i}" for i in range(rows)], "jpg_0": png(1), "jpg_1": png(9)})
    table["label_0"], table["label_1"] = 1.0, 0.0
    table.loc[table.index[:bad], "label_0"] = 0.7
    table.loc[table.index[bad : bad + ties], ["label_0", "label_1"]] = 0.5
    return table


def section(source, **changes) -> config.Pairs:
    return config.Pairs(
        **{"source": str(source), "validation_fraction": 0.3, "max_bad_fraction": 0.2} | changes
    )


def test_every_row_is_written_filtered_or_rejected(tmp_path) -> None:
    frame(40, bad=5, ties=7).to_parquet(tmp_path / "a.parquet")
    frame(50).tail(10).to_parquet(tmp_path / "b.parquet")
    out = tmp_path / "out"
    summary = pairs_stage.prepare(section(tmp_path, drop_ties=True), out)
    assert summary["read"] == 50 and summary["rejected"] == 5 and summary["filtered"] == {"ties": 7}
    assert summary["train"] + summary["validation"] + 5 + 7 == 50
    written = [p for part in ("train", "validation") for p in pairs.read_pairs(out / part)]
    assert len(written) == 38 and len({p.caption for p in written}) == 38
    rows = list(csv.DictReader((out / "rejected.csv").open()))
    assert [(r["shard"], r["row"]) for r in rows] == [("a.parquet", str(i)) for i in range(5)]
    assert "0.7" in rows[0]["reason"]


def test_pairs_that_repeat_contradict_or_compare_an_image_with_itself_are_counted(tmp_path) -> None:
    table = frame(30)
    swapped = table.head(3).assign(jpg_0=png(9), jpg_1=png(1), label_0=0.0, label_1=1.0)  # says the same
    swapped["caption"] = [" Caption 0", "caption  1", "caption 2."]
    contrary = table.iloc[[5, 6]].assign(jpg_0=[png(1), png(9)], jpg_1=[png(9), png(1)])
    contrary[["label_0", "label_1"]] = [[0.0, 1.0], [1.0, 0.0]]
    itself = table.tail(1).assign(caption="the same", jpg_1=png(1))
    tie = table.iloc[[7]].assign(label_0=0.5, label_1=0.5)
    everything = pd.concat([table, swapped, contrary, itself, tie])
    everything.to_parquet(tmp_path / "a.parquet")
    out = tmp_path / "out"
    summary = pairs_stage.prepare(section(tmp_path), out)
    assert summary["repeats"] == {"repeated": 6, "same_image": 1, "contradicted": 4}
    assert summary["rejected"] == 5 and summary["train"] + summary["validation"] == len(everything) - 5
    assert json.loads((out / "summary.json").read_text())["repeats"] == summary["repeats"]
    rows = {r["row"]: r["reason"] for r in csv.DictReader((out / "rejected.csv").open())}
    contradicted = "another row prefers the other image of this pair"
    assert rows == {**dict.fromkeys(("5", "6", "33", "34"), contradicted), "35": "both images are the same"}
    prompts_left = {p.caption for part in ("train", "validation") for p in pairs.read_pairs(out / part)}
    assert not prompts_left & {"caption 5", "caption 6", "the same"}


def test_annotators_who_disagree_do_not_make_a_source_bad(tmp_path) -> None:
    """40 % of these rows contradict each other; of rows that cannot be read, 2 % are too many."""
    table, source = frame(40), tmp_path / "a.parquet"
    contrary = table.head(10).assign(label_0=0.0, label_1=1.0)
    pd.concat([table, contrary]).to_parquet(source)
    out = tmp_path / "out"
    summary = pairs_stage.prepare(section(source, max_bad_fraction=0.01), out)
    assert summary["rejected"] == summary["repeats"]["contradicted"] == 20
    assert summary["train"] + summary["validation"] == 30
    pd.concat([table, contrary, frame(1, bad=1)]).to_parquet(source)
    with pytest.raises(ValueError, match="1 of 51 rows are bad"):
        pairs_stage.prepare(section(source, max_bad_fraction=0.01), out)


def test_an_image_in_two_encodings_is_the_same(tmp_path) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1))).save(buffer, format="WEBP", lossless=True)
    table = frame(20)
    table.at[3, "jpg_1"] = buffer.getvalue()
    table.to_parquet(tmp_path / "a.parquet")
    assert pairs_stage.prepare(section(tmp_path), tmp_path / "out")["repeats"]["same_image"] == 1


def test_pairs_without_repeats_have_no_count_of_them(tmp_path) -> None:
    frame(20).to_parquet(tmp_path / "a.parquet")
    assert "repeats" not in pairs_stage.prepare(section(tmp_path), tmp_path / "out")


def test_a_row_that_goes_uncounted_is_an_error(tmp_path, monkeypatch) -> None:
    frame(20).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "count_rows", lambda source: 21)
    with pytest.raises(ValueError, match="21 rows announced, 20 read"):
        pairs_stage.prepare(section(tmp_path), tmp_path / "out")


def test_more_bad_rows_than_the_bound_is_an_error(tmp_path) -> None:
    frame(20, bad=5).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"5 of 20 rows are bad.*rejected.csv"):
        pairs_stage.prepare(section(tmp_path), tmp_path / "out")
    assert len((tmp_path / "out/rejected.csv").read_text().splitlines()) == 6


def hpd_data(folder: Path, n: int = 30) -> None:
    (folder / "train").mkdir(parents=True)
    for value, name in enumerate(("a.png", "b.png")):
        (folder / "train" / name).write_bytes(png(value))
    votes = ([1, 0], [0, 1], [1, 1])
    entries = [
        {
            "prompt": f"p {i}, «é»",
            "human_preference": votes[i % 3],
            "file_path": ["a.png", "b.png"],
            "more": {},
        }
        for i in range(n)
    ]
    (folder / "train.json").write_text(
        json.dumps(entries, ensure_ascii=False, indent=random.choice((None, 2)))
    )


def test_hpd_comes_back_in_order_with_its_labels(tmp_path) -> None:
    hpd_data(tmp_path / "h")
    rows = [pair for pair, _ in sources.read_rows(tmp_path / "h")]
    assert [p.label_0 for p in rows[:3]] == [1, 0, 0.5] and rows[29].caption == "p 29, «é»"
    assert list(sources.read_captions(tmp_path / "h"))[2] == "p 2, «é»"
    summary = pairs_stage.prepare(section(tmp_path / "h"), tmp_path / "out")
    assert summary["read"] == 30 == summary["train"] + summary["validation"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file_path": ["a.png", "../../secret.png"]}, "leads out of the data set"),
        ({"file_path": ["a.png", "gone.png"]}, "no such image"),
        ({"file_path": ["a.png"]}, "file_path is ['a.png']; must be a list of two"),
        ({"human_preference": [2, 0]}, "labels are 2 and 0"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_bad_entries_of_hpd_are_rejected(tmp_path, change, reason) -> None:
    hpd_data(tmp_path / "h", 3)
    (tmp_path / "secret.png").write_bytes(png())
    entries = json.loads((tmp_path / "h/train.json").read_text())
    entries[1] |= change
    (tmp_path / "h/train.json").write_text(json.dumps(entries))
    rows = list(sources.read_rows(tmp_path / "h/train.json"))
    assert [p is not None for p, _ in rows] == [True, False, True]
    assert rows[1][1].row == 1 and reason in rows[1][1].reason


def test_shards_stream_from_a_url(tmp_path) -> None:
    """The same path as hf://datasets/..., whose client is one of fsspec's."""
    store = fsspec.filesystem("memory")
    with store.open("/data/train-0.parquet", "wb") as file:
        frame(20, bad=1).to_parquet(file)
    url = "memory://data"
    assert sources.count_rows(url) == 20
    rows = list(sources.read_rows(url))
    assert rows[0][1].shard == "train-0.parquet" and rows[5][0].caption == "caption 5"
    assert list(manifest(url)["files"]) == ["train-0.parquet"]


@pytest.mark.parametrize("read", [sources.count_rows, manifest])
def test_a_hub_without_network_is_one_line(read) -> None:
    with pytest.raises(ValueError, match="someone/pairs: .*the hub cannot be reached.*params.yaml") as error:
        read("hf://datasets/someone/pairs")
    assert "\n" not in str(error.value)


def test_memory_does_not_grow_with_the_rows(tmp_path) -> None:
    """Arrow's peak; a column of 12,000 images in one row group is 12 MB."""
    import pyarrow

    default, peaks = pyarrow.default_memory_pool(), {}
    for rows in (1000, 12000):
        table = frame(rows, bad=rows)
        table["jpg_1"] = [random.Random(i).randbytes(1000) for i in range(rows)]
        table.to_parquet(tmp_path / f"{rows}.parquet", row_group_size=rows, compression=None)
        pool = pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
        pyarrow.set_memory_pool(pool)
        try:
            assert sum(1 for _ in sources.read_rows(tmp_path / f"{rows}.parquet")) == rows
        finally:
            pyarrow.set_memory_pool(default)
        peaks[rows] = pool.max_memory()
    assert peaks[12000] < 8e6 and peaks[12000] < 2 * peaks[1000] + 4e6, peaks


def prompt_section(folder, **changes) -> config.Prompts:
    files = {"train": folder / "t.json", "evaluation": folder / "e.tsv", "pairs": folder / "pairs"}
    numbers = {"n_train": 2, "n_validation": 1, "n_test": 1, "max_tokens": 6}
    return config.Prompts(**{k: str(v) for k, v in files.items()} | numbers | changes)


@pytest.fixture
def lists(tmp_path):
    train = [
        "a cat",
        "A  Cat!",
        "a dog",
        "shown before",
        "a gory scene",
        "one two three four five six seven",
        "",
    ]
    rows = [{"caption": c, "trainset_idx": i} for i, c in enumerate(train)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    lines = [
        "Prompt\tCategory\tChallenge\tNote",
        "Shown  before\tA\tB\t",
        "caption 3\tA\tB\t",
        "x\u0301 y\tA\tB\t",
    ]
    (tmp_path / "e.tsv").write_text("\n".join([*lines, "m n\tA\tB\t", "o p\tA\tB\t"]))
    (tmp_path / "block.txt").write_text("# not in training\nGory\n")
    (tmp_path / "pairs").mkdir()
    frame(5).to_parquet(tmp_path / "pairs/a.parquet")
    return tmp_path


def test_every_prompt_is_written_or_counted(lists) -> None:
    section = prompt_section(lists, block_list=str(lists / "block.txt"))
    summary = prompts_stage.prepare(section, lambda p: len(p.split()), lists / "out")
    out = {"near_duplicate": 1, "elsewhere": 1, "blocked": 1, "too_long": 1, "empty": 1}
    assert summary["rejected"]["train"] == out and summary["rejected"]["evaluation"] == {"elsewhere": 1}
    for name, used in (("train", ["train"]), ("evaluation", ["test", "validation"])):
        count = sum(summary[n] for n in used) + sum(summary["rejected"][name].values())
        assert count + summary["unused"][name] == summary["read"][name]
    rows = list(csv.reader((lists / "out/rejected.csv").open()))
    assert ["train", "4", "blocked"] in rows and ["evaluation", "1", "elsewhere"] in rows
    assert (lists / "out/train.txt").read_text().splitlines() == sorted(
        ["a cat", "a dog"], key=(lists / "out/train.txt").read_text().index
    )


def test_a_block_list_that_is_missing_or_empty_is_refused(lists) -> None:
    (lists / "empty.txt").write_text("# nothing\n")
    for name in ("empty.txt", "gone.txt"):
        with pytest.raises(ValueError, match=name):
            prompts_stage.prepare(prompt_section(lists, block_list=str(lists / name)), len, lists / "out")


def test_a_blocked_word_is_a_complete_word(lists) -> None:
    from spo.data.prompts import key
    from spo.ingest.selection import block_list

    blocked = block_list(lists / "block.txt")
    assert blocked.search(key("so GORY!")) and not blocked.search(key("allegory"))
