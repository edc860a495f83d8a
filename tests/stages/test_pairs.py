"""The stage `pairs` with a filter by a real scorer."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from spo import config
from spo.data.decoding import open_image
from spo.data.pairs import read_pairs
from spo.rewards import load_scorer
from spo.scenes import world
from spo.stages import inputs, pairs
from tools.scenes import clips, tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> config.AestheticConfig:
    words = tokenizer.save(sorted(world.vocabulary()), tmp_path_factory.mktemp("tokenizer"))
    folder = tmp_path_factory.mktemp("aesthetic")
    clips.save_aesthetic(clips.RatedClip(clips.fresh_clip(words, seed=3)), words, folder)
    return config.AestheticConfig(clip=str(folder), head=str(folder / "head.pth"), image_size=48)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Forty pairs of noise, every fifth a tie."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(40):
        images = []
        for _ in range(2):
            file = io.BytesIO()
            pixels = torch.randint(256, (48, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            images.append(file.getvalue())
        label = 0.5 if i % 5 == 0 else float(i % 2)
        rows.append(
            {
                "caption": f"prompt {i}",
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": label,
                "label_1": 1 - label,
            }
        )
    folder = tmp_path_factory.mktemp("source")
    pd.DataFrame(rows).to_parquet(folder / "0.parquet")
    return folder


def section(source: Path, settings: config.AestheticConfig | None, bound: float = 0.0) -> config.Pairs:
    rules = (
        None
        if settings is None
        else config.PairFilter(
            aesthetic=settings, win_lose_above={"aesthetic": bound}, tie_below={"aesthetic": 1e-9}
        )
    )
    return config.Pairs(source=str(source), validation_fraction=0.2, filter=rules)


def test_training_pairs_alone_are_filtered_by_the_scorer(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    all_of_them = pairs.prepare(section(source, None), Path("plain"))
    summary = pairs.prepare(section(source, settings), Path("filtered"))
    plain, kept = (list(read_pairs(Path(f) / "train")) for f in ("plain", "filtered"))
    scorer = load_scorer("aesthetic", settings, "cpu", 16)

    def gap(pair) -> float:
        first, second = scorer.score([open_image(pair.image_0), open_image(pair.image_1)], [pair.caption] * 2)
        return (first - second) * (1 if pair.label_0 == 1 else -1)

    assert kept == [pair for pair in plain if pair.label_0 != 0.5 and gap(pair) > 0]
    assert 0 < len(kept) < len(plain)
    assert summary["validation"] == all_of_them["validation"]
    assert list(read_pairs("filtered/validation")) == list(read_pairs("plain/validation"))
    assert summary["left_out"] == {"filter": len(plain) - len(kept)}

    written = json.loads(Path("filtered/summary.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(Path("filtered/filter.csv").open(encoding="utf-8")))
    failing = written["fail_the_rule_of"]["aesthetic"]
    assert len(rows) == len(plain) and sum(row["fails"] == "" for row in rows) == len(kept)
    assert failing["win_lose"] + failing["ties"] == len(plain) - len(kept)
    assert not list(Path(".spo/resume").glob("pairs-*"))  # the cache of a finished filter


def test_the_run_has_the_counts_of_repeats(source, tmp_path, monkeypatch) -> None:
    class Run:
        logged: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.logged.update(metrics)

    table = pd.read_parquet(source / "0.parquet")
    (tmp_path / "in").mkdir()
    pd.concat([table, table.head(2)]).to_parquet(tmp_path / "in/0.parquet")
    raw = config.validate(yaml.safe_load(config.preset("smoke")))
    params = raw.model_copy(update={"pairs": section(tmp_path / "in", None)})
    monkeypatch.setattr(pairs, "stage", lambda *_: contextlib.nullcontext(Run()))
    monkeypatch.setattr(pairs, "OUTPUT", tmp_path / "out")
    pairs.run(params)
    assert Run.logged["repeated"] == 2 and Run.logged["contradicted"] == Run.logged["same_image"] == 0


def test_without_a_filter_nothing_of_it_is_written(source, tmp_path) -> None:
    pairs.prepare(section(source, None), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "set_aside.csv",
        "summary.json",
        "train",
        "validation",
    ]
    assert "fail_the_rule_of" not in json.loads((tmp_path / "out/summary.json").read_text())


def test_a_filter_that_keeps_nothing_is_one_line(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pairs.filter: keeps none of .* training pairs"):
        pairs.prepare(section(source, settings, bound=1e6), Path("out"))


def test_a_scorer_that_is_missing_leaves_the_last_outputs(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs.prepare(section(source, None), Path("out"))
    missing = settings.model_copy(update={"head": "nowhere.pth"})
    with pytest.raises(ValueError, match="nowhere.pth: no such file"):
        pairs.prepare(section(source, missing), Path("out"))
    assert Path("out/summary.json").exists()


def test_the_filter_s_scorers_are_pinned_with_the_pairs(settings, source) -> None:
    raw = config.validate(yaml.safe_load(config.preset("smoke")))
    filtered = raw.model_copy(update={"pairs": section(source, settings)})
    assert inputs.sources(raw)["pairs"] == [(raw.pairs.source, None)]
    assert inputs.sources(filtered)["pairs"] == [
        (str(source), None),
        (settings.clip, None),
        (settings.head, None),
    ]
