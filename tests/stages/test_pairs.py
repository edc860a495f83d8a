"""The stage `pairs` with a filter by a real scorer."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from group import run_in
from PIL import Image

from spo import cli, config
from spo.data.decoding import open_image
from spo.data.pairs import read_pairs
from spo.ingest import gaps
from spo.ingest import labels as labelling
from spo.rewards import aesthetic, load_scorer
from spo.runtime.processes import is_main_process
from spo.scenes import world
from spo.stages import inputs, pairs
from spo.types import PreferencePair
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
    assert summary["filtered"] == {"filter": len(plain) - len(kept)}

    written = json.loads(Path("filtered/summary.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(Path("filtered/filter.csv").open(encoding="utf-8")))
    failing = written["fail_the_rule_of"]["aesthetic"]
    assert len(rows) == len(plain) and sum(row["fails"] == "" for row in rows) == len(kept)
    assert failing["win_lose"] + failing["ties"] == len(plain) - len(kept)
    assert not list(Path(".spo/resume").glob("pairs-*"))  # the cache of a finished filter


def test_the_run_has_the_counts_of_repeats(source, tmp_path, monkeypatch, logged) -> None:
    table = pd.read_parquet(source / "0.parquet")
    (tmp_path / "in").mkdir()
    pd.concat([table, table.head(2)]).to_parquet(tmp_path / "in/0.parquet")
    raw = config.validate(yaml.safe_load(config.preset("smoke")))
    params = raw.model_copy(update={"pairs": section(tmp_path / "in", None)})
    monkeypatch.setattr(pairs, "OUTPUT", tmp_path / "out")
    pairs.run(params)
    assert logged["repeated"] == 2 and logged["contradicted"] == logged["same_image"] == 0


def test_without_a_filter_nothing_of_it_is_written(source, tmp_path) -> None:
    pairs.prepare(section(source, None), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "rejected.csv",
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


def labels(settings: config.AestheticConfig, gap: float = 1e-6) -> config.PseudoLabels:
    return config.PseudoLabels(aesthetic=settings, gap=gap)


def difference(scorer, pair: PreferencePair) -> float:
    first, second = scorer.score([open_image(pair.image_0), open_image(pair.image_1)], [pair.caption] * 2)
    return first - second


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("filtered", [False, True])
def test_labels_by_a_scorer_lie_beside_the_pairs(settings, source, tmp_path, monkeypatch, filtered) -> None:
    """A row for each training pair that is kept, in their order; the pairs keep the annotators' labels."""
    monkeypatch.chdir(tmp_path)
    rules = section(source, settings if filtered else None)
    pairs.prepare(rules, Path("plain"))
    scorer = load_scorer("aesthetic", settings, "cpu", 16)
    kept = list(read_pairs("plain/train"))
    by_hand = [difference(scorer, pair) for pair in kept]
    apart = sorted(abs(d) for d in by_hand)
    gap = sum(apart[len(apart) // 2 - 1 :][:2]) / 2
    pairs.prepare(rules, Path("labelled"), labels(settings, gap))

    plain, written = files(Path("plain")), files(Path("labelled"))
    rows = list(csv.DictReader(io.StringIO(written.pop("labels.csv").decode())))
    expected = [0.5 if abs(d) < gap else float(d > 0) for d in by_hand]
    assert [float(row["label_0"]) for row in rows] == expected
    assert [float(row["gap"]) for row in rows] == pytest.approx(by_hand, abs=1e-6)
    summary = json.loads(written.pop("summary.json"))
    facts = summary.pop("pseudo_labels")
    assert summary == json.loads(plain.pop("summary.json")) and written == plain
    both = [(e, p.label_0) for e, p in zip(expected, kept, strict=True) if 0.5 not in (e, p.label_0)]
    decided = sum(e != 0.5 for e in expected)
    assert facts == {
        "decided": decided,
        "ties": len(kept) - decided,
        "agreement_with_annotators": round(sum(a == b for a, b in both) / len(both), 4),
    }


@pytest.mark.parametrize("same", [True, False])
def test_a_scorer_of_filter_and_labels_scores_once(settings, source, tmp_path, monkeypatch, same) -> None:
    monkeypatch.chdir(tmp_path)
    scored: list[int] = []
    plain = aesthetic.Aesthetic.score
    monkeypatch.setattr(aesthetic.Aesthetic, "score", lambda *a: scored.append(len(a[1])) or plain(*a))
    pairs.prepare(section(source, settings), Path("out"))
    alone = sum(scored)
    scored.clear()
    own = settings if same else settings.model_copy(update={"revision": "main"})
    pairs.prepare(section(source, settings), Path("out"), labels(own))
    assert sum(scored) == alone * (1 if same else 2)


def test_two_processes_score_what_one_does(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (gaps, labelling):
        monkeypatch.setattr(module, "BUFFER", 3)
    what = section(source, settings), labels(settings)
    pairs.prepare(what[0], Path("one"), what[1])
    plain = aesthetic.Aesthetic.score

    def body() -> int:
        scored: list[int] = []
        aesthetic.Aesthetic.score = lambda *a: scored.append(len(a[1])) or plain(*a)
        if is_main_process():
            pairs.prepare(what[0], Path("two"), what[1])
        else:
            pairs.share(*what)
        return sum(scored)

    first, second = run_in(2, body)
    read = len(list(csv.reader(Path("one/filter.csv").open(encoding="utf-8")))) - 1
    # buffers of 3 pairs: each process scores every other one
    assert first + second == 2 * read and abs(first - second) <= 6 and second
    assert files(Path("one")) == files(Path("two"))
    assert not list(Path(".spo/resume").glob("pairs-*"))


def test_labelling_resumes_after_the_cached_gaps(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (gaps, labelling):
        monkeypatch.setattr(module, "BUFFER", 4)
    plain, scored = aesthetic.Aesthetic.score, []

    def interrupted(*given) -> list[float]:
        if len(scored) == 4:  # two buffers, both sides
            raise KeyboardInterrupt
        scored.append(len(given[1]))
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(aesthetic.Aesthetic, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pairs.prepare(section(source, None), Path("out"), labels(settings))
    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(aesthetic.Aesthetic, "score", lambda *a: again.append(len(a[1])) or plain(*a))
        summary = pairs.prepare(section(source, None), Path("out"), labels(settings))
    pairs.prepare(section(source, None), Path("whole"), labels(settings))
    assert sum(again) == 2 * (summary["train"] - 8)
    assert files(Path("out")) == files(Path("whole"))


def test_a_gap_that_no_pair_reaches_is_one_line(settings, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="^preference.labels.gap: no pair's scores differ by 1000000"
    ) as error:
        pairs.prepare(section(source, None), Path("out"), labels(settings, 1e6))
    assert "\n" not in str(error.value)


def test_the_labels_scorer_is_pinned_apart_from_the_start_clip(settings) -> None:
    raw = config.validate(yaml.safe_load(config.preset("smoke")))
    preference = raw.preference.model_copy(update={"labels": labels(settings)})
    labelled = raw.model_copy(update={"preference": preference})
    assert inputs.sources(raw)["labels"] == []
    assert inputs.sources(labelled)["labels"] == [(settings.clip, None), (settings.head, None)]
    assert inputs.sources(labelled)["clip"] == inputs.sources(raw)["clip"]


@pytest.mark.parametrize("asked", ["nothing", "filter", "labels"])
def test_processes_count_for_pairs_where_a_scorer_runs(
    settings, source, tmp_path, monkeypatch, asked
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(config.preset("smoke")) | {"processes": 2}
    dumped = settings.model_dump(mode="json")
    if asked == "filter":
        raw["pairs"]["filter"] = {"aesthetic": dumped, "win_lose_above": {"aesthetic": 0.0}}
    if asked == "labels":
        raw["preference"]["labels"] = {"aesthetic": dumped}
    Path("params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    launched: list[int] = []
    monkeypatch.setattr(cli.processes, "launch", lambda arguments, n: launched.append(n))
    monkeypatch.setattr(pairs, "run", lambda *given: launched.append(1))
    assert cli.main(["pairs"]) == 0
    assert launched == [1 if asked == "nothing" else 2]
