"""Trains the oracle and the annotators' eyes: they share only their class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spo.scenes.oracle import Perception
from spo.scenes.world import ABSENT, ATTRIBUTES, CHOICES, QUALITY
from tools.scenes.base_model import random_scenes, to_float
from tools.scenes.fit import fit

STEPS, BATCH = 1800, 48
SCENES = 16_000  # half of them are also seen through the VAE, whose images the UNet draws


def train(name: str, width: int, vae: Any, work: Path, seed: int) -> Perception:
    """A network that predicts quality and attributes of rendered and of decoded images."""
    torch.manual_seed(seed)
    model = Perception(width)
    attributes, quality, pixels, _ = random_scenes(SCENES, seed)
    last = torch.tensor([len(c) for c in CHOICES])
    classes = torch.where(attributes == ABSENT, last, attributes)
    half = SCENES // 2
    pixels = torch.cat([pixels, through_vae(vae, pixels[:half])])
    classes, quality = torch.cat([classes, classes[:half]]), torch.cat([quality, quality[:half]])

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pixels), (BATCH,), generator=generator)
        images = to_float(pixels[index])
        images = images + 0.02 * torch.randn(images.shape, generator=generator)
        seen_quality, logits = model(images)
        cross_entropy = sum(F.cross_entropy(z, classes[index, i]) for i, z in enumerate(logits))
        return cross_entropy / len(logits) + 10 * F.mse_loss(seen_quality, quality[index])

    fit(name, model, loss, steps=STEPS, lr=1.5e-3, work=work, seed=seed, ema=0.99, weight_decay=0.05)
    return model.requires_grad_(False)


@torch.no_grad()
def through_vae(vae: Any, pixels: Tensor) -> Tensor:
    """Images uint8 as the VAE gives them back."""
    parts = []
    for chunk in tqdm(pixels.split(100), desc="through the VAE", mininterval=5):
        images = to_float(chunk).contiguous(memory_format=torch.channels_last)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).contiguous())
    return torch.cat(parts)


def validate(model: Perception, images: Tensor, attributes: Tensor, quality: Tensor) -> dict[str, object]:
    """Correlation and mean error of each quality factor, accuracy of each attribute where it is there."""
    seen_quality, log_probs = model.perceive(images)
    report: dict[str, object] = {"n": len(images)}
    columns = [*zip(QUALITY, seen_quality.T, quality.T, strict=True)]
    columns.append(("aesthetics", seen_quality.mean(1), quality.mean(1)))
    for name, seen, truth in columns:
        correlation = torch.corrcoef(torch.stack([seen, truth]))[0, 1].item()
        error = (seen - truth).abs().mean().item()
        report[name] = {"correlation": round(correlation, 4), "mean_error": round(error, 4)}
    for i, name in enumerate(ATTRIBUTES):
        there = attributes[:, i] != ABSENT
        hit = log_probs[i].argmax(1)[there] == attributes[there, i]
        report[name] = {"accuracy": round(hit.float().mean().item(), 4)}
    return report
