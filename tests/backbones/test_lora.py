"""Adapters as files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import DDIMScheduler

from spo import config
from spo.commands import registry
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule
from spo.tracking.store import load_mlflow

SAVE = """
import sys
from pathlib import Path
from spo import backbones, config
backbone = backbones.load(config.Backbone(family="sd", checkpoint=sys.argv[1]), "cpu")
backbone.add_lora(config.Lora(rank=2, alpha=2), seed=0)
backbone.save_lora(Path(sys.argv[2]))
"""


def test_an_adapter_saved_again_is_the_same_file(load, tmp_path) -> None:
    """safetensors has another order of metadata each time; DVC names files by their bytes."""
    backbone = load("sd")
    backbone.add_lora(config.Lora(rank=2, alpha=2), seed=0)
    saved = set()
    for number in range(4):
        backbone.save_lora(tmp_path / str(number))
        saved.add((tmp_path / str(number) / "pytorch_lora_weights.safetensors").read_bytes())
    (content,) = saved
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header) == sorted(header)
    trained = json.loads(header["__metadata__"]["lora_adapter_metadata"])["unet.target_modules"]
    assert trained == sorted(trained) and len(trained) > 1


@pytest.mark.smoke  # a process that loads diffusers
@pytest.mark.nightly
def test_equal_adapters_are_equal_files(checkpoints, load, tmp_path) -> None:
    """Whatever the order of hash tables in a process is: DVC names files by their bytes."""
    here, there = tmp_path / "here", tmp_path / "there"
    backbone = load("sd")
    backbone.add_lora(config.Lora(rank=2, alpha=2), seed=0)
    backbone.save_lora(here)
    other = {**os.environ, "PYTHONHASHSEED": "0" if os.environ.get("PYTHONHASHSEED") != "0" else "1"}
    words = [sys.executable, "-c", SAVE, checkpoints["sd"], there]
    subprocess.run(words, check=True, capture_output=True, env=other)
    saved = (here / "pytorch_lora_weights.safetensors").read_bytes()
    assert saved == (there / "pytorch_lora_weights.safetensors").read_bytes()
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    assert header["__metadata__"] and list(header) == sorted(header)


def test_mlflows_flavor_gives_the_champion_back(load, checkpoints, tmp_path, monkeypatch) -> None:
    """The model from the registry draws the same image, and none of its files is a pickle."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    backbone = load("sd")
    backbone.add_lora(config.Lora(rank=2, alpha=6), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.trainable_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    backbone.save_lora(Path("outputs/align/spo"))
    Path("outputs/scores").mkdir()
    for name, score in (("base", 20.0), ("spo", 21.0)):
        table = {
            "index": [0, 1],
            "prompt": ["a circle", "a star"],
            "seed": [0, 1],
            "pickscore": [score, score + 0.1],
        }
        pd.DataFrame(table).to_csv(f"outputs/scores/{name}.csv", index=False)
    raw = yaml.safe_load(config.preset("smoke")) | {
        "name": "tiny",
        "registry": {"improves": ["pickscore"], "holds": {}, "min_prompts": 2},
    }
    raw["backbone"] = {"family": "sd", "checkpoint": str(checkpoints["sd"])}
    assert registry.register(config.validate(raw)).alias == "champion"

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the base is found from any folder
    mlflow = load_mlflow()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        pipe = mlflow.diffusers.load_model("models:/tiny@champion").load_pipeline(device="cpu")
    finally:
        mlflow.set_tracking_uri(None)
    stored = {p.suffix for p in (tmp_path / "mlartifacts").rglob("*") if p.is_file()}
    assert ".safetensors" in stored and stored <= {
        ".safetensors",
        ".json",
        ".yaml",
        ".txt",
        ".csv",
        ".md",
        "",
    }

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    schedule = Schedule.from_config(backbone.scheduler_config, 6)

    def noise() -> SampleNoise:
        return SampleNoise(0, [5], backbone.latent_shape)

    def ours() -> np.ndarray:
        with backbone.inference():
            latents = sample_latents(backbone, schedule, ["a red circle"], noise(), guidance=3.0, eta=0.0)
            return (backbone.decode(latents).clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) * 127.5

    how = {"num_inference_steps": 6, "eta": 0.0, "guidance_scale": 3.0, "output_type": "np"}
    theirs = pipe("a red circle", latents=noise().draw(), **how).images * 255
    assert abs(ours() - theirs).max() <= 2
    backbone = load("sd")
    assert abs(ours() - theirs).max() > 8, "the adapter is in it"
