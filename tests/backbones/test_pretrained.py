"""`pretrained` in place of training, and methods set to null, through the stages on tiny models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import hub_cache
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from small_experiment import pixels, run, write

from spo import cli
from spo.preference.model import StepAwarePreferenceModel
from tools.scenes import clips

pytestmark = pytest.mark.smoke

COMMIT = "a" * 40
README = b"---\nlicense: openrail++\n---\n# Released\n"
of_family = pytest.mark.parametrize("experiment", ["sd"], indirect=True)


def read(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def kohyas(checkpoint: str) -> dict[str, torch.Tensor]:
    """A LoRA of one layer in kohya's key names, with an alpha unlike its rank."""
    unet = DiffusionPipeline.from_pretrained(checkpoint).unet
    name = next(n for n, m in unet.named_modules() if n.endswith("attn2.to_q"))
    weight, key = unet.get_submodule(name).weight, f"lora_unet_{name.replace('.', '_')}"
    generator = torch.Generator().manual_seed(1)
    return {
        f"{key}.lora_down.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"{key}.lora_up.weight": torch.randn(weight.shape[0], 2, generator=generator),
        f"{key}.alpha": torch.tensor(8.0),
    }


def without_pairs(params: dict) -> None:
    params["pairs"]["source"] = params["prompts"]["pairs"] = params["prompts"]["train"] = None
    params["prompts"]["n_train"] = 0
    params["align"]["lpo"] = params["generate"]["lpo"] = params["generate"]["base_high_guidance"] = None
    params["report"]["baselines"] = ["base", "diffusion_dpo"]


def fine_tuned(checkpoint: str) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(0.5)
    return pipeline


@of_family
def test_with_released_weights_alone_every_stage_runs_and_nothing_is_trained(
    experiment, tmp_path, monkeypatch, capsys
) -> None:
    """align.spo.pretrained: a LoRA of the hub; align.diffusion_dpo.pretrained: a UNet; align.lpo: null."""
    base = experiment["backbone"]["checkpoint"]
    save_file(kohyas(base), tmp_path / "kohya.safetensors")
    content = (tmp_path / "kohya.safetensors").read_bytes()
    cache = tmp_path / "hub"
    hub_cache.add(cache, "own/lora", {"a/kohya.safetensors": content, "README.md": README}, COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    fine_tuned(base).unet.save_pretrained(tmp_path / "dpo")
    without_pairs(experiment)
    experiment["align"]["spo"]["pretrained"] = f"hf://own/lora@{COMMIT}/a/kohya.safetensors"
    experiment["align"]["diffusion_dpo"]["pretrained"] = "dpo"
    experiment["generate"]["diffusion_dpo_high_guidance"] = {
        "adapter": "outputs/align/diffusion_dpo",
        "guidance": 4.0,
    }
    write(experiment)
    for stage in (
        ("inputs",),
        ("prompts",),
        ("pairs",),
        ("preference",),
        ("preference", "unconditioned"),
        ("preference", "latent"),
        *(("align", method) for method in ("spo", "diffusion_dpo", "lpo")),
    ):
        run(*stage)
    said = capsys.readouterr().err
    for line in (
        "spo: pairs: nothing to do: pairs.source is null",
        "spo: preference: nothing to do: no method is trained with preference",
        "spo: preference_unconditioned: nothing to do: no method is trained with preference",
        "spo: preference_latent: nothing to do: no method is trained with latent_preference",
        "spo: align lpo: nothing to do: align.lpo is null",
    ):
        assert line in said
    assert read("outputs/inputs/clip.json") == read("outputs/inputs/pairs.json") == []
    (pin,) = read("outputs/inputs/pretrained_spo.json")
    assert pin["files"] == {"a/kohya.safetensors": hashlib.sha256(content).hexdigest()}
    assert (pin["revision"], pin["licence"]) == (COMMIT, "openrail++")
    assert Path("outputs/align/spo/pytorch_lora_weights.safetensors").read_bytes() == content
    card = Path("outputs/align/spo/README.md").read_text(encoding="utf-8")
    assert (
        f"hf://own/lora@{COMMIT}/a/kohya.safetensors, commit {COMMIT}\n- their licence: openrail++\n" in card
    )
    assert (
        hashlib.sha256(content).hexdigest() in card and "Recipe" not in card and "load_lora_weights" in card
    )
    given, written = (
        load_file(f"{f}/diffusion_pytorch_model.safetensors")
        for f in ("dpo", "outputs/align/diffusion_dpo/unet")
    )
    assert given.keys() == written.keys() and all(torch.equal(given[k], written[k]) for k in given)

    for variant in (
        "base",
        "base_high_guidance",
        "spo",
        "diffusion_dpo",
        "diffusion_dpo_high_guidance",
        "lpo",
    ):
        run("generate", variant)
        run("score", variant)
    run("generate", "--lora", "kohya.safetensors", "--output", "elsewhere")
    drawn = {v: pixels(f"outputs/images/{v}/images.zip") for v in ("base", "spo", "diffusion_dpo")}
    assert all(map(torch.equal, drawn["spo"], pixels("elsewhere/images.zip")))
    assert not any(map(torch.equal, drawn["spo"], drawn["base"]))
    assert not any(map(torch.equal, drawn["diffusion_dpo"], drawn["base"]))
    run("report")
    rows = json.loads(Path("reports/comparisons.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in rows} == {"spo", "diffusion_dpo", "diffusion_dpo_high_guidance"}
    page = Path("reports/report.html").read_text(encoding="utf-8")
    assert ">LPO" not in page and ">nan<" not in page and ">SPO<" in page
    assert "There are no training curves" in page and "Diffusion-DPO, more guidance" in page
    gallery = Path("reports/gallery.html").read_text(encoding="utf-8")
    assert '"lpo"' not in gallery and ">LPO<" not in gallery


@pytest.fixture
def released_clip(words) -> StepAwarePreferenceModel:
    torch.manual_seed(5)
    model = StepAwarePreferenceModel(clips.fresh_clip(words, seed=5))
    for name, weight in model.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


@of_family
def test_an_official_step_aware_model_is_measured_and_written_as_a_trained_one(
    experiment, tmp_path, released_clip
) -> None:
    """preference.pretrained: a state dict, and then the folder that the stage made of it."""
    torch.save(released_clip.state_dict(), tmp_path / "official.bin")
    experiment["preference"]["pretrained"] = "official.bin"
    write(experiment)
    for stage in (("inputs",), ("prompts",), ("pairs",), ("preference",), ("preference", "clean_only")):
        run(*stage)
    measured = read("reports/metrics/preference.json")
    assert measured["accuracy"].keys() == {"0", "701"} and measured["pretrained"] == "official.bin"
    assert measured["n"] > 0 and measured["unet_samples"] == 0
    assert read("reports/metrics/preference_clean_only.json") == {"accuracy": {}, "n": 0}
    state = load_file("outputs/preference/model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in released_clip.model.state_dict().items())
    assert (tmp_path / "outputs/preference/tokenizer.json").exists()
    (tmp_path / "outputs/preference").rename(tmp_path / "own")
    experiment["preference"]["pretrained"] = "own"
    write(experiment)
    run("inputs")
    run("preference")
    assert read("reports/metrics/preference.json") == {**measured, "pretrained": "own"}
    assert load_file("outputs/preference/model.safetensors").keys() == state.keys()
    run("align", "spo")  # which loads it


@of_family
def test_a_latent_reward_model_of_ours_is_taken_with_its_own_feature_guidance(experiment, tmp_path) -> None:
    """latent_preference.pretrained: a folder of the stage."""
    for stage in (("inputs",), ("prompts",), ("pairs",), ("preference", "latent")):
        run(*stage)
    trained = read("reports/metrics/preference_latent.json")
    (tmp_path / "outputs/preference_latent").rename(tmp_path / "own")
    experiment["latent_preference"]["pretrained"] = "own"
    write(experiment)
    run("inputs")
    run("preference", "latent")
    assert read("reports/metrics/preference_latent.json")["accuracy"] == trained["accuracy"]
    first, again = (load_file(f"{f}/model.safetensors") for f in ("own", "outputs/preference_latent"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    experiment["latent_preference"]["feature_guidance"] = 3.5
    write(experiment)
    assert cli.main(["preference", "latent"]) == 2


@of_family
def test_a_whole_pipeline_is_taken_and_one_of_the_other_family_refused(
    experiment, checkpoints, tmp_path, capsys
) -> None:
    """align.lpo.pretrained: a pipeline."""
    fine_tuned(experiment["backbone"]["checkpoint"]).save_pretrained(tmp_path / "whole")
    experiment["align"]["lpo"]["pretrained"] = "whole"
    write(experiment)
    run("inputs")
    run("align", "lpo")
    given, written = (
        load_file(f"{f}/unet/diffusion_pytorch_model.safetensors") for f in ("whole", "outputs/align/lpo")
    )
    assert all(torch.equal(given[k], written[k]) for k in given)
    assert "from_pretrained" in Path("outputs/align/lpo/README.md").read_text(encoding="utf-8")
    experiment["align"]["lpo"]["pretrained"] = str(checkpoints["sdxl"])
    write(experiment)
    run("inputs")
    capsys.readouterr()
    assert cli.main(["align", "lpo"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("spo: ") and "sdxl" in line


@of_family
def test_a_dry_run_says_what_is_taken_and_what_is_not_done(experiment, tmp_path, capsys) -> None:
    without_pairs(experiment)
    for method in ("spo", "diffusion_dpo"):
        experiment["align"][method]["pretrained"] = f"{method}.safetensors"
        save_file(kohyas(experiment["backbone"]["checkpoint"]), tmp_path / f"{method}.safetensors")
    write(experiment)
    for command, line in (
        (("pairs",), "nothing to do: pairs.source is null"),
        (("preference", "latent"), "nothing to do: no method is trained with latent_preference"),
        (("align", "lpo"), "nothing to do: align.lpo is null"),
        (("generate", "lpo"), "nothing to do: generate.lpo is null"),
        (("align", "spo"), "align spo.pretrained: spo.safetensors"),
    ):
        run(*command, "--dry-run")
        assert line in capsys.readouterr().out, command
