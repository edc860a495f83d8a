"""Checkpoints with other files, and their images beside those of diffusers' own pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from spo import backbones, config
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents

PROMPTS = ["a red circle", "a large blue square"]


def edit(path: Path, drop: tuple[str, ...] = (), **changes) -> None:
    content = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in drop}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def load(folder: Path, family: str, **changes) -> backbones.StableDiffusion:
    return backbones.load(config.Backbone(family=family, checkpoint=str(folder), **changes), "cpu")


def refused(folder: Path, family: str, *words: str, **changes) -> None:
    with pytest.raises(ValueError) as error:
        load(folder, family, **changes)
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    for word in words:
        assert word in line, line


def ours(backbone, guidance: float, prompts: list[str] = PROMPTS) -> torch.Tensor:
    """Images in [0,1] of two prompts by five deterministic steps."""
    schedule = backbone.schedule(5)
    noise = SampleNoise(0, [1, 2], backbone.latent_shape)
    images = backbone.decode(sample_latents(backbone, schedule, prompts, noise, guidance, eta=0.0))
    return (images / 2 + 0.5).clamp(0, 1)


def theirs(folder: Path, guidance: float, side: int | None = None, **scheduler) -> torch.Tensor:
    """The same by diffusers' pipeline with its DDIM; `side`: of the latents."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **scheduler)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size
    side = side or (size if isinstance(size, int) else size[0])
    latents = SampleNoise(0, [1, 2], (pipe.unet.config.in_channels, side, side)).draw()
    pixels = side * pipe.vae_scale_factor
    options = {"num_inference_steps": 5, "guidance_scale": guidance, "eta": 0.0, "output_type": "pt"}
    options |= {"height": pixels, "width": pixels}
    return pipe(PROMPTS, latents=latents, **options).images


def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.std() > 0.05  # images that say something
    assert torch.allclose(one, other, atol=1e-4), float((one - other).abs().max())


def inputs(backbone, seed: int = 0):
    """x_t, timesteps and conditioning of two samples."""
    x_t = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))
    conditioning, _ = backbone.guided(backbone.encode_prompts(PROMPTS), 3.5)
    return x_t, torch.tensor([10, 700]), conditioning


def predict(backbone, **how) -> torch.Tensor:
    with backbone.inference():
        return backbone.predict(*inputs(backbone), **how)


def pretend_training(backbone) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.trainable_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
