"""Every stage on small random pipelines of both families: the real classes, folders of save_pretrained."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from functools import partial

import blip
import group
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from small_experiment import pixels, run, write

from spo import cli, config
from spo.backbones.description import describe
from spo.diffusion.announced import schedule_of
from spo.methods import method_spec
from spo.rewards.pickscore import PickScore
from spo.runtime.messages import OURS

VARIANTS = ("base", "spo", "diffusion_dpo", "lpo")
# (updates, pairs) of two iterations. Diffusion-DPO: an update of 2 pairs each. SPO: at threshold 0 every
# diverted step gives a pair for each of two prompts, 8 an iteration (sd: four steps) or 6 (sdxl: three), in
# updates of 4; LPO: the same
TRAINED = {
    "sd": {"spo": (4, 16), "diffusion_dpo": (2, 4), "lpo": (4, 16)},
    "sdxl": {"spo": (4, 12), "diffusion_dpo": (2, 4), "lpo": (4, 12)},
}
AGAIN = {"sd": "spo", "sdxl": "diffusion_dpo"}  # trained without validation images too, and then in full


@pytest.mark.smoke
def test_every_stage_runs(experiment, tmp_path) -> None:
    for stage in (("inputs",), ("prompts",), ("pairs",), ("preference",), ("preference", "latent")):
        run(*stage)
    base_of = json.loads((tmp_path / "outputs/preference_latent/config.json").read_text())
    assert base_of["base"]["channels of the UNet's down blocks"] == [32, 64]
    measured = json.loads((tmp_path / "reports/metrics/preference_latent.json").read_text())
    assert measured["accuracy"].keys() == {"0", "701"} and measured["updates"] == 2
    for method in config.METHODS:
        run("align", method)
        trained = json.loads((tmp_path / f"reports/metrics/align_{method}.json").read_text())
        expected = TRAINED[experiment["backbone"]["family"]][method]
        assert (trained["updates"], trained["pairs"]) == expected, method
    for variant in VARIANTS:
        run("generate", variant)
        run("score", variant)
        rows = list(csv.DictReader((tmp_path / f"outputs/scores/{variant}.csv").open()))
        assert len(rows) == 2 and {"pickscore", "hps", "aesthetic"} <= rows[0].keys()
    samples = sorted((tmp_path / "outputs/align/spo/samples").glob("*.png"))
    assert (
        samples[0].stem == "000000"
        and len(samples) == 2
        and samples[0].read_bytes() != samples[1].read_bytes()
    )
    curve = list(csv.DictReader((tmp_path / "reports/training/spo.csv").open()))
    assert {"validation/hps", "validation/diversity", "kl"} <= curve[0].keys() and curve[0]["validation/hps"]
    run("generate", "--lora", "outputs/align/spo", "--output", "elsewhere")
    run("score", "--images", "elsewhere", "--baseline", "outputs/images/base")
    assert (tmp_path / "outputs/images/spo/images.zip").read_bytes() == (
        tmp_path / "elsewhere/images.zip"
    ).read_bytes()
    card = (tmp_path / "outputs/align/spo/README.md").read_text()
    assert "# smoke: LoRA by Step-aware Preference Optimization" in card and "- updates: " in card
    assert "seconds" not in card and "inner_steps: 2" in card
    DiffusionPipeline.from_pretrained(experiment["backbone"]["checkpoint"]).load_lora_weights(
        tmp_path / "outputs/align/spo"
    )

    method = AGAIN[experiment["backbone"]["family"]]
    watched = weights(tmp_path, method)
    experiment["align"][method]["validation"] = None
    write(experiment)
    run("align", method)
    assert not (tmp_path / "outputs/align" / method / "samples").exists()
    for name, value in weights(tmp_path, method).items():
        assert torch.equal(value, watched[name]), "validation changed the training"

    experiment["align"][method]["lora"] = None
    experiment["align"][method]["optimizer"]["learning_rate"] = 1e-4
    write(experiment)
    run("align", method)
    DiffusionPipeline.from_pretrained(tmp_path / "outputs/align" / method)
    before = (tmp_path / f"outputs/images/{method}/images.zip").read_bytes()
    run("generate", method)
    assert (tmp_path / f"outputs/images/{method}/images.zip").read_bytes() != before


@pytest.mark.smoke
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_a_scorer_labels_in_place_of_the_annotators(experiment, tmp_path, capsys) -> None:
    scorer = experiment["score"]["pickscore"]
    for stage in ("inputs", "prompts", "pairs"):
        run(stage)
    rows = [
        r
        for shard in sorted((tmp_path / "outputs/pairs/train").glob("*"))
        for r in pq.read_table(shard).to_pylist()
    ]
    pickscore = PickScore(config.PickScoreConfig(**scorer), device="cpu", batch_size=4)
    first, second = (
        pickscore.score(
            [Image.open(io.BytesIO(r[f"image_{side}"])) for r in rows], [r["caption"] for r in rows]
        )
        for side in (0, 1)
    )
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    in_order = sorted(apart)
    gap = sum(in_order[len(apart) // 2 - 1 :][:2]) / 2  # half are ties, and rounding moves none across
    experiment["preference"]["labels"] = {"pickscore": scorer, "gap": gap}
    write(experiment)
    for stage in ("inputs", "pairs", "preference"):
        run(stage)
    facts = json.loads((tmp_path / "reports/metrics/preference.json").read_text())["pseudo_labels"]
    decided = [
        (a > b, r["label_0"] == 1) for a, b, r in zip(first, second, rows, strict=True) if abs(a - b) >= gap
    ]
    assert facts["decided"] == len(decided) and facts["ties"] == len(rows) - len(decided)
    assert facts["agreement_with_annotators"] == pytest.approx(
        sum(a == b for a, b in decided) / len(decided), abs=1e-4
    )
    experiment["preference"]["labels"]["gap"] = 1e6
    write(experiment)
    assert cli.main(["pairs"]) == 2
    assert "preference.labels.gap: no pair's scores differ by" in capsys.readouterr().err
    experiment["preference"]["labels"]["hps"] = experiment["score"]["hps"]
    write(experiment)
    assert cli.main(["preference"]) == 2
    assert (
        "must name one scorer (pickscore, hps, aesthetic, imagereward, clipscore), not 2"
        in capsys.readouterr().err
    )


def weights(folder, method: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "outputs/align" / method / "pytorch_lora_weights.safetensors")


@pytest.mark.smoke
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_two_processes_draw_score_and_label_as_one_does(experiment, tmp_path, monkeypatch) -> None:
    """And train on pairs that they label and encode in shares."""
    experiment["preference"]["labels"] = {"pickscore": experiment["score"]["pickscore"], "gap": 1e-6}
    experiment["pairs"]["rows_per_shard"] = 3
    write(experiment)
    for stage in (("inputs",), ("prompts",), ("pairs",), ("generate", "base"), ("score", "base")):
        run(*stage)
    archive, scores = tmp_path / "outputs/images/base/images.zip", tmp_path / "outputs/scores/base.csv"
    before = archive.read_bytes(), list(csv.DictReader(scores.open()))
    archive.unlink(), scores.unlink()
    labelled = {p: p.read_bytes() for p in (tmp_path / "outputs/pairs").rglob("*") if p.is_file()}
    assert tmp_path / "outputs/pairs/labels.csv" in labelled
    shutil.rmtree(tmp_path / "outputs/pairs")
    write(experiment | {"processes": 2, "generate": experiment["generate"] | {"batch_size": 1}})
    monkeypatch.setenv(OURS, str(os.getpid()))
    for stage in (("generate", "base"), ("score", "base"), ("pairs",), ("preference",)):
        group.run_in(2, lambda stage=stage: run(*stage))
    for ours, theirs in zip(pixels(archive), pixels(io.BytesIO(before[0])), strict=True):
        assert (ours - theirs).abs().max() <= 1
    for ours, theirs in zip(csv.DictReader(scores.open()), before[1], strict=True):
        for name in ("pickscore", "hps", "aesthetic"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-4, rel=1e-4)
    assert {p: p.read_bytes() for p in labelled} == labelled
    facts = json.loads((tmp_path / "reports/metrics/preference.json").read_text())["pseudo_labels"]
    assert (
        facts["decided"] + facts["ties"]
        == len((tmp_path / "outputs/pairs/labels.csv").open().readlines()) - 1
    )
    assert (tmp_path / "outputs/preference/model.safetensors").exists()


@pytest.mark.smoke
@pytest.mark.nightly  # tests/runtime/test_processes.py has the launcher, the test before what it launches
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_a_stage_starts_itself_in_two_processes(experiment, tmp_path) -> None:
    for stage in (("inputs",), ("prompts",), ("pairs",), ("preference",)):
        run(*stage)
    write(experiment | {"processes": 2})
    run("align", "spo")
    assert (tmp_path / "outputs/align/spo/pytorch_lora_weights.safetensors").exists()
    assert len(list((tmp_path / "outputs/align/spo/samples").glob("*.png"))) == 2


@pytest.mark.smoke
@pytest.mark.nightly
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_what_stops_two_processes_is_one_line(experiment, capfd) -> None:
    for stage in ("inputs", "prompts"):
        run(stage)
    write(experiment | {"processes": 2})
    assert cli.main(["align", "spo"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spo: ")]
    assert len(errors) == 1 and "there; run `make repro`" in errors[0]


@pytest.mark.smoke
@pytest.mark.parametrize("experiment", ["sd", pytest.param("sdxl", marks=pytest.mark.nightly)], indirect=True)
def test_a_dry_run_shows_what_a_stage_does_and_writes_nothing(experiment, tmp_path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    plans = {}
    stages = ("inputs", "preference", "preference latent", "align spo", "align lpo", "generate spo")
    for stage in stages:
        run(*stage.split(), "--dry-run")
        plans[stage] = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "preference.init: data/scorers/pickscore" in plans["inputs"]
    assert "2 updates of 4 pairs" in plans["preference"]
    # K = 2, two prompts, two iterations. sd: four steps in two blocks of two; a prompt takes 1 + 2 * 3
    # forwards to generate and score, and 2 * 3 samples trained on, which the reference sees too; guided:
    # 2 * 4 * 13 and 2 * 4 * 6. sdxl: its scheduler's last step has no variance, so the second block is one
    # step: 1 + 2 * 3 and 4
    sd = experiment["backbone"]["family"] == "sd"
    pairs, unet, trained = (16, 104, 48) if sd else (12, 88, 32)
    for method in ("spo", "lpo"):
        assert f"4 rollouts in 2 iterations; at most {pairs} pairs, 4 updates" in plans[f"align {method}"]
    params = config.validate(experiment)
    cost = method_spec("spo").cost(params, partial(schedule_of, describe(params.backbone).scheduler_config))
    assert (cost.rollouts, cost.updates) == (unet - trained, 4 * trained)  # the reference is in updates
    assert "2 updates of 4 pairs" in plans["preference latent"]
    assert "2 images of 4 steps, guidance 2" in plans["generate spo"]
    for stage in stages[1:]:
        assert "memory: " in plans[stage] and "GFLOP per UNet sample" in plans[stage]
        assert "time: about " in plans[stage]


def test_a_dry_run_without_network_names_what_cannot_be_reached(experiment, capsys) -> None:
    experiment["backbone"]["checkpoint"] = "nobody/has-this-model"
    write(experiment)
    assert cli.main(["align", "spo", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "backbone.checkpoint: nobody/has-this-model" in error
    assert "give a local path in params.yaml" in error


@pytest.mark.smoke
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_suites_by_scorers_of_the_papers_without_training(experiment, tmp_path, capsys) -> None:
    """Two variants of the base, two images of a prompt, ImageReward, CLIPScore and a filter of the pairs."""
    pickscore = experiment["score"]["pickscore"]
    (tmp_path / "suite.json").write_text(json.dumps(["a blue ring", "a small ring", "a large red star"]))
    experiment["generate"] |= {"images_per_prompt": 2, "suites": {"hpd_anime": "suite.json"}}
    experiment["score"] |= {
        "imagereward": blip.save(tmp_path / "imagereward").model_dump(),
        "clipscore": {"model": pickscore["model"], "image_size": pickscore["image_size"]},
    }
    experiment["pairs"]["filter"] = {"pickscore": pickscore, "win_lose_above": {"pickscore": 0.0}}
    experiment["report"] = {"baselines": ["base", "base_high_guidance"], "bootstrap_samples": 50}
    write(experiment)
    for stage in ("inputs", "prompts", "pairs"):
        run(stage)
    pins = json.loads((tmp_path / "outputs/inputs/imagereward.json").read_text())
    assert [pin["path"] for pin in pins] == list(experiment["score"]["imagereward"].values())[:3]
    assert "suite.json" in (tmp_path / "outputs/inputs/prompts.json").read_text()
    summary = json.loads((tmp_path / "outputs/pairs/summary.json").read_text())
    assert summary["filtered"]["filter"] == summary["fail_the_rule_of"]["pickscore"]["win_lose"] > 0
    kept = len((tmp_path / "outputs/prompts/suites/hpd_anime.txt").read_text().splitlines())
    for variant in ("base", "base_high_guidance"):
        for suite in ([], ["--suite", "hpd_anime"]):
            run("generate", variant, *suite)
            run("score", variant, *suite)
    rows = list(csv.DictReader((tmp_path / "outputs/scores/suites/hpd_anime/base.csv").open()))
    assert len(rows) == 2 * kept and {"pickscore", "imagereward", "clipscore"} <= rows[0].keys()
    assert rows[0]["prompt"] == rows[1]["prompt"] and rows[0]["imagereward"] != rows[1]["imagereward"]
    assert (tmp_path / "reports/metrics/score_base_suite_hpd_anime.json").exists()
    run("report")
    compared = json.loads((tmp_path / "reports/suites.json").read_text())["hpd_anime"]
    assert {row["metric"] for row in compared} >= {"imagereward", "clipscore"}
    assert {row["n"] for row in compared} == {kept}
    page = (tmp_path / "reports/report.html").read_text()
    assert "ImageReward" in page and "CLIPScore" in page and "<h3>hpd_anime</h3>" in page
    run("score", "base", "--dry-run")
    assert "score.imagereward.med_config: " in capsys.readouterr().out
    for command in (["generate", "base"], ["score", "base"]):
        assert cli.main([*command, "--suite", "parti"]) == 2
        assert "generate.suites: no suite 'parti'; known: hpd_anime" in capsys.readouterr().err
    assert cli.main(["score", "--images", "x", "--suite", "hpd_anime"]) == 2
    assert "--suite needs a variant; give --prompts FILE with --images" in capsys.readouterr().err
