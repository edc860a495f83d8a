"""Every stage on small random pipelines of both families: the real classes, folders of save_pretrained."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from spo import cli, config
from spo.rewards.pickscore import PickScore
from spo.scenes import world
from tools.scenes import clips

VARIANTS = ("base", "spo", "diffusion_dpo")
# (updates, pairs) of two iterations. Diffusion-DPO: an update of 2 pairs each. SPO: at threshold 0 every
# diverted step gives a pair for each of two prompts, 8 an iteration (sd: four steps) or 6 (sdxl: three), in
# updates of 4
TRAINED = {
    "sd": {"spo": (4, 16), "diffusion_dpo": (2, 4)},
    "sdxl": {"spo": (4, 12), "diffusion_dpo": (2, 4)},
}


def pairs(folder, captions: list[str]) -> None:
    """Pick-a-Pic's columns; the first image is preferred in every other row."""
    generator = torch.Generator().manual_seed(0)

    def picture() -> bytes:
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {
            "caption": caption,
            "jpg_0": picture(),
            "jpg_1": picture(),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "has_label": True,
            "num_example_per_prompt": 1,
        }
        for i, caption in enumerate(captions)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")


def inputs(folder, words) -> None:
    generator = torch.Generator().manual_seed(1)
    captions = sorted(set(world.captions(world.random_attributes(60, generator), generator)))
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts/train.txt").write_text("\n".join(captions[:8]))
    (folder / "prompts/evaluation.txt").write_text("\n".join(captions[8:12]))
    pairs(folder / "pairs", captions[12:24])
    clips.save_pickscore(clips.fresh_clip(words, seed=1), words, folder / "scorers/pickscore")
    torch.manual_seed(2)
    model, model_config, _ = clips.new_open_clip(words)
    clips.save_hps(model, model_config, words, folder / "scorers/hps")
    clips.save_aesthetic(
        clips.RatedClip(clips.fresh_clip(words, seed=3)), words, folder / "scorers/aesthetic"
    )


@pytest.fixture(params=["sd", "sdxl"])
def experiment(request, checkpoints, words, tmp_path, monkeypatch):
    """A folder with params.yaml and data, as a user has it; the working directory."""
    monkeypatch.chdir(tmp_path)
    inputs(tmp_path / "data", words)
    params = yaml.safe_load(config.preset("smoke"))
    params["backbone"] = {"family": request.param, "checkpoint": str(checkpoints[request.param])}
    params["prompts"] |= {"n_train": 4, "n_validation": 2, "n_test": 2, "vocabulary": None}
    params["prompts"]["max_tokens"] = 40
    params["pairs"]["validation_fraction"] = 0.3
    params["align"]["spo"] |= {"inner_steps": 2, "gradient_accumulation": 2, "gradient_checkpointing": True}
    params["align"]["spo"]["divert_start_step"] = 0
    params["score"]["oracle"], params["preference"]["local_prompts"] = None, 0
    write(params)
    return params


def write(params: dict) -> None:
    with open("params.yaml", "w") as file:
        yaml.safe_dump(params, file)


def run(*arguments: str) -> None:
    assert cli.main(arguments) == 0, arguments


@pytest.mark.smoke
def test_every_stage_runs(experiment, tmp_path) -> None:
    for stage in ("inputs", "prompts", "pairs", "preference"):
        run(stage)
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

    watched = weights(tmp_path)
    for method in config.METHODS:
        experiment["align"][method]["validation"] = None
    write(experiment)
    for method in config.METHODS:
        run("align", method)
        assert not (tmp_path / "outputs/align" / method / "samples").exists()
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, watched[name]), "validation changed the training"

    for method in config.METHODS:
        experiment["align"][method]["lora"] = None
        experiment["align"][method]["optimizer"]["learning_rate"] = 1e-4
    write(experiment)
    for method in config.METHODS:
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
    judge = PickScore(config.PickScoreConfig(**scorer), device="cpu", batch_size=4)
    first, second = (
        judge.score([Image.open(io.BytesIO(r[f"image_{side}"])) for r in rows], [r["caption"] for r in rows])
        for side in (0, 1)
    )
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    in_order = sorted(apart)
    gap = sum(in_order[len(apart) // 2 - 1 :][:2]) / 2  # half are ties, and rounding moves none across
    experiment["preference"]["labels"] = {"pickscore": scorer, "gap": gap}
    write(experiment)
    run("inputs")
    run("preference")
    told = json.loads((tmp_path / "reports/metrics/preference.json").read_text())["pseudo_labels"]
    decided = [
        (a > b, r["label_0"] == 1) for a, b, r in zip(first, second, rows, strict=True) if abs(a - b) >= gap
    ]
    assert told["decided"] == len(decided) and told["ties"] == len(rows) - len(decided)
    assert told["agree_with_people"] == pytest.approx(
        sum(a == b for a, b in decided) / len(decided), abs=1e-4
    )
    experiment["preference"]["labels"]["gap"] = 1e6
    write(experiment)
    assert cli.main(["preference"]) == 2
    assert "preference.labels.gap: no pair's scores differ by" in capsys.readouterr().err
    experiment["preference"]["labels"]["hps"] = experiment["score"]["hps"]
    write(experiment)
    assert cli.main(["preference"]) == 2
    assert "must name one scorer (pickscore, hps or aesthetic), not 2" in capsys.readouterr().err


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        f"{method} {name}": value
        for method in config.METHODS
        for name, value in load_file(
            folder / "outputs/align" / method / "pytorch_lora_weights.safetensors"
        ).items()
    }


@pytest.mark.smoke
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_stages_start_themselves_in_two_processes(experiment, tmp_path, capfd) -> None:
    for stage in (("inputs",), ("prompts",), ("pairs",), ("generate", "base"), ("score", "base")):
        run(*stage)
    archive, scores = tmp_path / "outputs/images/base/images.zip", tmp_path / "outputs/scores/base.csv"
    before = archive.read_bytes(), list(csv.DictReader(scores.open()))
    archive.unlink(), scores.unlink()
    write(experiment | {"processes": 2, "generate": experiment["generate"] | {"batch_size": 1}})
    for stage in (("generate", "base"), ("score", "base"), ("preference",), ("align", "spo")):
        run(*stage)
    for ours, theirs in zip(pixels(archive), pixels(io.BytesIO(before[0])), strict=True):
        assert (ours - theirs).abs().max() <= 1
    for ours, theirs in zip(csv.DictReader(scores.open()), before[1], strict=True):
        for name in ("pickscore", "hps", "aesthetic"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-4, rel=1e-4)
    assert (tmp_path / "outputs/align/spo/pytorch_lora_weights.safetensors").exists()
    assert len(list((tmp_path / "outputs/align/spo/samples").glob("*.png"))) == 2
    assert (tmp_path / "outputs/preference/model.safetensors").exists()
    capfd.readouterr()
    (tmp_path / "outputs/prompts/train.txt").unlink()
    assert cli.main(["align", "spo"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spo: ")]
    assert len(errors) == 1 and "no training prompts there" in errors[0]


def pixels(archive) -> list[torch.Tensor]:
    with zipfile.ZipFile(archive) as file:
        images = [Image.open(io.BytesIO(file.read(n))) for n in file.namelist() if n.endswith(".png")]
    return [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in images]


def test_a_dry_run_shows_what_a_stage_does_and_writes_nothing(experiment, tmp_path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    plans = {}
    for stage, variant in (("inputs", None), ("preference", None), ("align", "spo"), ("generate", "spo")):
        run(stage, *([variant] if variant else []), "--dry-run")
        plans[stage] = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "preference.init: data/scorers/pickscore" in plans["inputs"]
    assert "2 updates of 4 pairs" in plans["preference"]
    # K = 2, two prompts, two iterations. sd: four steps in two blocks of two; a prompt takes 1 + 2 * 3
    # forwards to generate and score, 2 * 3 samples trained on, each 4 forwards; guided: 2 * 4 * 31 in all.
    # sdxl: its scheduler's last step has no variance, so the second block is one step: 1 + 2 * 3 + 4 * 4
    sd = experiment["backbone"]["family"] == "sd"
    pairs, samples = (16, 248) if sd else (12, 184)
    assert f"4 rollouts in 2 iterations; at most {pairs} pairs, 4 updates" in plans["align"]
    assert f"time: {samples} UNet samples" in plans["align"]
    assert "2 images of 4 steps, guidance 2" in plans["generate"]
    for stage in ("preference", "align", "generate"):
        assert "memory: " in plans[stage] and "GFLOP per UNet sample" in plans[stage]


def test_a_dry_run_without_network_names_what_cannot_be_reached(experiment, capsys) -> None:
    experiment["backbone"]["checkpoint"] = "nobody/has-this-model"
    write(experiment)
    assert cli.main(["align", "spo", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "backbone.checkpoint: nobody/has-this-model" in error
    assert "give its folder in params.yaml" in error
