"""Presets with released weights, through all stages: tiny models in the hub's cache under the presets' names.

Changed are sizes, precision, numbers of prompts and the text of the prompts, not what is trained or taken.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import blip
import hub_cache
import pandas as pd
import pytest
import small_experiment
import torch
import yaml
from small_experiment import run, write

from spo import backbones, config
from spo.preference.model import StepAwarePreferenceModel
from spo.runtime import hub
from spo.training.alignment import save
from tools.scenes import clips

FAMILIES = {"sd15": "sd", "sdxl": "sdxl"}


def small(preset: str, quick: bool) -> dict[str, Any]:
    params = yaml.safe_load(config.preset(preset, quick=quick))
    params["backbone"]["dtype"] = "fp32"
    test = params["prompts"]
    test |= {
        "n_test": 2,
        "n_train": 4 if test["n_train"] else 0,
        "n_validation": 2 if test["n_validation"] else 0,
    }
    test["max_tokens"] = 40
    params["generate"]["num_inference_steps"] = 4
    score = params["score"]
    hps = Path("data/scorers/hps")
    score["hps"] |= {"architecture": str(hps / "open_clip_config.json"), "tokenizer": str(hps)}
    for name in ("pickscore", "hps", "aesthetic", "clipscore"):
        if score[name]:
            score[name]["image_size"] = 48
    if score["imagereward"]:
        score["imagereward"] = blip.save(Path("reward")).model_dump()
    params["report"]["bootstrap_samples"] = 50
    params["pairs"]["validation_fraction"] = 0.3  # of 12 pairs
    for section in filter(None, params["align"].values()):
        shorten(section)
    return params


def shorten(section: dict[str, Any]) -> None:
    """One iteration of two prompts; any two candidates are a pair, or a random model would find none."""
    section |= {"iterations": 1, "batch_size": 4, "checkpoint_every": 1}
    if "candidates" in section:
        section |= {"prompts_per_iteration": 2, "num_inference_steps": 4, "divert_start_step": 1}
        section |= {"threshold": 0.0, "threshold_end": None}
    if section["validation"]:
        section["validation"] |= {"every": 1, "prompts": 2, "max_fall": None}


def fill(cache: Path, params: dict[str, Any], checkpoint: Path, words: Any) -> None:
    """Tiny models and lists under the names of a preset."""
    base, score = params["backbone"], params["score"]
    of = hub_cache.of_folder
    hub_cache.add(cache, base["checkpoint"], of(checkpoint), base["revision"])
    if base["vae"]:
        hub_cache.add(cache, base["vae"], of(checkpoint / "vae"))
    clip = of(Path("data/scorers/pickscore"))
    for name, revision in (
        (score["pickscore"]["model"], score["pickscore"]["revision"]),
        (score["pickscore"]["processor"], None),
        *([(score["clipscore"]["model"], score["clipscore"]["revision"])] if score["clipscore"] else []),
    ):
        hub_cache.add(cache, name, clip, revision)
    weights = Path("data/scorers/hps/HPS_scenes_compressed.pt").read_bytes()
    hub_cache.add(cache, score["hps"]["checkpoint"], {hub.place(score["hps"]["checkpoint"]).pattern: weights})
    if score["aesthetic"]:
        folder, head = Path("data/scorers/aesthetic"), score["aesthetic"]["head"]
        hub_cache.add(cache, score["aesthetic"]["clip"], of(folder), score["aesthetic"]["revision"])
        hub_cache.add(cache, head, {hub.place(head).pattern: (folder / "head.pth").read_bytes()})
    lists = params["prompts"]
    for name, file in ((lists["train"], "train"), (lists["evaluation"], "evaluation")):
        if name is not None:
            captions = Path(f"data/prompts/{file}.txt").read_text(encoding="utf-8").splitlines()
            hub_cache.add(cache, name, shards(name, pd.DataFrame({"caption": captions})))
    if params["pairs"]["source"]:
        frame = pd.read_parquet("data/pairs/train-00000.parquet")
        hub_cache.add(cache, params["pairs"]["source"], shards(params["pairs"]["source"], frame))
    released(cache, params, checkpoint, words)


def shards(name: str, frame: pd.DataFrame) -> dict[str, bytes]:
    """The table as the first shard that a pattern selects, which is then the only one."""
    out = io.BytesIO()
    frame.to_parquet(out)
    path = (
        hub.place(name).pattern.replace("train-*", "train-00000-of-00001").replace("*_unique", "test_unique")
    )
    return {path.replace("-*", "-of-00001" if "00000-*" in path else "-00000-of-00001"): out.getvalue()}


def released(cache: Path, params: dict[str, Any], checkpoint: Path, words: Any) -> None:
    """Official formats: a state dict, a UNet alone, a LoRA in diffusers' names."""
    torch.manual_seed(5)
    model = StepAwarePreferenceModel(clips.fresh_clip(words, seed=5))
    named = {"preference": params["preference"], **params["align"]}
    unet = hub_cache.of_folder(checkpoint / "unet")
    for section in (s for s in named.values() if s and s["pretrained"]):
        at = hub.place(section["pretrained"])
        if at.pattern.endswith(".bin"):
            state = io.BytesIO()
            torch.save(model.state_dict(), state)
            files = {at.pattern: state.getvalue()}
        elif at.pattern.endswith(".safetensors"):
            files = {at.pattern: lora(params["backbone"]["family"], checkpoint)}
        else:
            folder = at.pattern or "unet"
            files = {f"{folder}/{path}": content for path, content in unet.items()}
        hub_cache.add(cache, section["pretrained"], files)


def lora(family: str, checkpoint: Path) -> bytes:
    settings = config.Lora(rank=2, alpha=2)
    backbone = backbones.load(config.Backbone(family=family, checkpoint=str(checkpoint)), "cpu")
    backbone.add_lora(settings, 0)
    with torch.no_grad():
        for name, parameter in backbone.unet.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    save(backbone, settings, Path("lora"))
    return Path("lora/pytorch_lora_weights.safetensors").read_bytes()


@pytest.fixture
def through_all_stages(checkpoints, words, fresh_store, tmp_path, monkeypatch):
    """run(preset, quick): every stage; returns the comparisons."""

    def through(preset: str, quick: bool = False) -> list[dict[str, Any]]:
        monkeypatch.chdir(tmp_path)
        shutil.copy(fresh_store, tmp_path / "mlflow.db")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        small_experiment.inputs(tmp_path / "data", words)
        params = small(preset, quick)
        fill(tmp_path / "hub", params, checkpoints[FAMILIES[preset.partition("-")[0]]], words)
        write(params)
        for stage in ("inputs", "prompts", "pairs", "preference", "preference latent"):
            run(*stage.split())
        for method in config.METHODS:
            run("align", method)
        for variant in config.VARIANTS:
            run("generate", variant)
            run("score", variant)
        run("report")
        return json.loads(Path("reports/comparisons.json").read_text(encoding="utf-8"))

    return through


@pytest.mark.smoke
def test_a_table_of_released_weights_is_made_without_training(through_all_stages) -> None:
    rows = through_all_stages("sd15-eval")
    assert {row["metric"] for row in rows} == set(config.SCORERS)
    assert {row["method"] for row in rows} == {
        "base_high_guidance",
        "diffusion_dpo",
        "diffusion_dpo_high_guidance",
        "spo",
        "lpo",
    }
    assert not any(json.loads(p.read_text()).get("updates") for p in Path("reports/metrics").glob("align_*"))


@pytest.mark.smoke
@pytest.mark.nightly
def test_the_table_of_sdxl_has_one_guidance(through_all_stages) -> None:
    rows = through_all_stages("sdxl-eval")
    assert {row["method"] for row in rows} == {"diffusion_dpo", "spo", "lpo"}
    assert not any(json.loads(p.read_text()).get("updates") for p in Path("reports/metrics").glob("align_*"))


@pytest.mark.smoke
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("preset", "quick"),
    [("sd15-overnight", False), ("sdxl-overnight", False), ("sd15", True), ("sd15", False)],
)
def test_spo_is_trained_from_the_released_preference_model(through_all_stages, preset, quick) -> None:
    rows = through_all_stages(preset, quick)
    assert {row["metric"] for row in rows} <= set(config.SCORERS)
    trained = json.loads(Path("reports/metrics/align_spo.json").read_text(encoding="utf-8"))
    assert trained["iterations"] == 1 and trained["updates"] > 0
    assert "spo" in {row["method"] for row in rows}
