"""How far the oracle can be trusted: on rendered, decoded, redrawn and freely drawn images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spo import backbones, config
from spo.diffusion import ddim
from spo.diffusion.denoiser import GuidedDenoiser
from spo.scenes.oracle import Perception, fidelity
from spo.scenes.world import QUALITY
from tools.scenes import Build, generation
from tools.scenes.base_model import random_scenes, to_float
from tools.scenes.perception import through_vae
from tools.scenes.perception import validate as compare_with_truth
from tools.scenes.render import LUMA

REDRAWN_FROM = 300  # images noised to about this timestep and denoised by the base model
N = 1000


def validate(build: Build, seed: int) -> dict[str, object]:
    """Truth is known for rendered images, the same through the VAE, and (but for what the base model
    changed) the same half-noised and redrawn. On freely drawn ones the oracle is compared with the
    network `eyes`, which is independent, and with plain pixel measures."""
    oracle, eyes = Perception.load(build.output / "oracle"), Perception.load(build.work / "eyes")
    attributes, quality, pixels, captions = random_scenes(N, seed)
    half = slice(0, N // 2)
    redrawn = _redraw(build.output / "base", to_float(pixels[half]), captions[half], seed)
    kinds = {
        "rendered": (to_float(pixels), attributes, quality),
        "through_the_vae": (to_float(through_vae(build.vae(), pixels)), attributes, quality),
        "redrawn": (redrawn, attributes[half], quality[half]),
    }
    report: dict[str, object] = {
        name: compare_with_truth(oracle, *columns) for name, columns in kinds.items()
    }
    report["freely_drawn"] = _freely_drawn(oracle, eyes, build, seed)
    return report


@torch.no_grad()
def _redraw(base: Path, images: Tensor, captions: list[str], seed: int) -> Tensor:
    backbone = backbones.load(config.Backbone(family="sd", checkpoint=str(base)), "cpu")
    schedule = backbone.schedule(20)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(images), 100):
        chunk, texts = images[start : start + 100], captions[start : start + 100]
        steps = [t for t in schedule.timesteps.tolist() if t <= REDRAWN_FROM]
        conditioning = backbone.encode_prompts(texts)
        x_t = backbone.encode(chunk)
        noise = torch.randn(x_t.shape, generator=generator)
        x_t = schedule.add_noise(x_t, noise, torch.full((len(chunk),), steps[0]))
        for t in steps:
            timesteps = torch.full((len(chunk),), t)
            output = GuidedDenoiser.of(backbone, conditioning, 1.0)(x_t, timesteps)
            step = ddim.transition(schedule, output, timesteps, x_t, 1.0)
            x_t = ddim.sample(step, torch.randn(x_t.shape, generator=generator))
        parts.append(backbone.decode(x_t).clamp(-1, 1))
    return torch.cat(parts)


def _freely_drawn(oracle: Perception, eyes: Perception, build: Build, seed: int) -> dict[str, object]:
    captions = generation.different_captions(512, seed)
    which = torch.zeros(512, dtype=torch.int64)  # the base model at guidance 2
    cache = build.work / "validation images"
    pixels = generation.draw(build.output / "base", captions, which, cache, seed, build.processes)
    images = to_float(pixels)
    by_oracle, log_probs = oracle.perceive(images)
    by_eyes, eyes_log_probs = eyes.perceive(images)
    measures = _pixel_measures(images)
    report: dict[str, object] = {"n": len(captions)}
    for i, name in enumerate(QUALITY):
        with_eyes = torch.corrcoef(torch.stack([by_oracle[:, i], by_eyes[:, i]]))[0, 1].item()
        with_pixels = torch.corrcoef(torch.stack([by_oracle[:, i], measures[name]]))[0, 1].item()
        report[name] = {"correlation_eyes": round(with_eyes, 4), "correlation_pixels": round(with_pixels, 4)}
    means = by_oracle.mean(1), by_eyes.mean(1)
    together = torch.corrcoef(torch.stack(means))[0, 1].item()
    report["aesthetics"] = {"correlation_eyes": round(together, 4), "mean": round(means[0].mean().item(), 4)}
    alignment = [fidelity(p, captions) for p in (log_probs, eyes_log_probs)]
    same = torch.corrcoef(torch.stack(alignment))[0, 1].item()
    report["alignment"] = {"correlation_eyes": round(same, 4), "mean": round(alignment[0].mean().item(), 4)}
    return report


def _pixel_measures(images: Tensor) -> dict[str, Tensor]:
    """Crude signs [N] of each factor from pixels alone: none is independent of the others."""
    rgb = (images + 1) / 2
    grey = (rgb * LUMA.view(1, 3, 1, 1)).sum(1, keepdim=True)
    smooth = torch.nn.functional.avg_pool2d(grey, 12)
    gradient = (grey[..., 1:] - grey[..., :-1]).abs().flatten(1)
    fine = (grey - torch.nn.functional.avg_pool2d(grey, 5, stride=1, padding=2)).abs().flatten(1)
    return {
        "sharp": gradient.quantile(0.99, dim=1) / grey.flatten(1).std(dim=1),
        "clean": -fine.median(dim=1).values,
        "saturated": (rgb.amax(1) - rgb.amin(1)).flatten(1).quantile(0.9, dim=1),
        "lit": smooth.flatten(1).amin(1) / smooth.flatten(1).amax(1),
    }
