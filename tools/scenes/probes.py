"""Measure a CLIP: linear probes of its image features, and right captions against wrong ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from spo.scenes import world
from spo.scenes.oracle import Perception
from spo.scenes.world import QUALITY
from tools.scenes.base_model import random_scenes, to_float, tokens
from tools.scenes.clips import Features, LabelledPairs
from tools.scenes.contrastive import another_attribute

RENDERS = 4000
RIDGE = 1e-3


@torch.no_grad()
def image_features(features: Features, tokenizer: CLIPTokenizer, pixels: Tensor) -> Tensor:
    """Normalised image features [N,D] of images uint8 [N,3,48,48]."""
    empty = tokens(tokenizer, [""])
    return torch.cat([features(to_float(part), empty)[0] for part in pixels.split(256)])


def linear_probe(features: Tensor, truth: Tensor) -> dict[str, float]:
    """R2 of each factor [N,4] by ridge regression on features [N,D]: fitted on half, tested on the other."""
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    half, y = len(x) // 2, truth.double()
    gram = x[:half].T @ x[:half] + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    predicted = x[half:] @ torch.linalg.solve(gram, x[:half].T @ y[:half])
    left = (predicted - y[half:]).square().sum(0) / (y[half:] - y[half:].mean(0)).square().sum(0)
    return {name: round(1 - part, 4) for name, part in zip(QUALITY, left.tolist(), strict=True)}


def probes(
    features: Features, tokenizer: CLIPTokenizer, oracle: Perception, drawn: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    """R2 on fresh renders (their true quality) and on images `drawn` by the base model (the oracle's)."""
    _, quality, pixels, _ = random_scenes(RENDERS, seed)
    seen, _ = oracle.perceive(to_float(drawn))
    sets = {"renders": (pixels, quality), "drawn": (drawn, seen)}
    return {
        name: linear_probe(image_features(features, tokenizer, images), truth)
        for name, (images, truth) in sets.items()
    }


@torch.no_grad()
def caption_accuracy(features: Features, tokenizer: CLIPTokenizer, seed: int, n: int = 4000) -> float:
    """How often a fresh render is nearer to its caption than to one with another attribute; neither names
    quality."""
    attributes, _, pixels, captions = random_scenes(n, seed)
    drawn = torch.Generator().manual_seed(seed)
    wrong = world.captions(another_attribute(attributes, drawn), drawn)
    hits = []
    for i in range(0, n, 250):
        texts = tokens(tokenizer, captions[i : i + 250] + wrong[i : i + 250])
        image, text, _ = features(to_float(pixels[i : i + 250]), texts)
        right, other = text.chunk(2)
        hits.append((image * right).sum(-1) > (image * other).sum(-1))
    return round(torch.cat(hits).float().mean().item(), 4)


@torch.no_grad()
def agreement(
    features: Features, labelled: LabelledPairs, tokenizer: CLIPTokenizer
) -> dict[str, float | int]:
    """Share of clear labels that a model of preferences agrees with, and its standard error."""
    ids, scores = tokens(tokenizer, labelled.captions), []
    for pixels in (labelled.pixels_0, labelled.pixels_1):
        parts = [features(to_float(p), i) for p, i in zip(pixels.split(256), ids.split(256), strict=True)]
        scores.append(torch.cat([(image * text).sum(-1) for image, text, _ in parts]))
    clear = labelled.label_0 != 0.5
    share = ((scores[0] > scores[1]) == (labelled.label_0 > 0.5))[clear].float().mean().item()
    n = int(clear.sum())
    return {
        "clear_labels": n,
        "agreement": round(share, 4),
        "standard_error": round(math.sqrt(share * (1 - share) / n), 4),
    }
