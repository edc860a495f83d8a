"""Images that the base model generates for captions, in several ways, for annotators to compare and rate."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spo import backbones, config
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.scenes import world
from tools.scenes import draws

BATCH = 16  # images at a time; one thread draws as many a second in batches of 16 to 128


@dataclass(frozen=True)
class Generator:
    """One way of drawing with the base model (DDIM, eta 1), as Pick-a-Pic has several."""

    name: str
    guidance: float
    steps: int


GENERATORS = (
    Generator("base-g2", 2.0, 20),
    Generator("base-g4-10steps", 4.0, 10),
    Generator("base-g2-10steps", 2.0, 10),
    Generator("base-g1", 1.0, 20),
)


def different_captions(n: int, seed: int) -> list[str]:
    """n captions, all different."""
    generator = torch.Generator().manual_seed(seed)
    attributes = draws.random_attributes(2 * n + 100, generator)
    return list(dict.fromkeys(world.captions(attributes, generator)))[:n]


def draw_captions(n: int, seed: int, without: Sequence[str] = ()) -> list[str]:
    """n captions as users write them: short ones come more than once, those of `without` never."""
    generator = torch.Generator().manual_seed(seed)
    excluded = set(without)
    drawn: list[str] = []
    while len(drawn) < n:
        attributes = draws.random_attributes(n, generator)
        drawn += [c for c in world.captions(attributes, generator) if c not in excluded]
    return drawn[:n]


def draw(
    base: Path, captions: Sequence[str], which: Tensor, cache: Path, seed: int, processes: int = 1
) -> Tensor:
    """Images uint8 [N,3,48,48] of captions by GENERATORS[which[i]].

    Every image's noise is its own, so neither batches nor processes change it. Each batch is
    saved in `cache`; an interrupted run resumes after the last one.
    """
    batches = []
    for g, source in enumerate(GENERATORS):
        rows = (which == g).nonzero()[:, 0]
        batches += [(source, part) for part in rows.split(BATCH) if len(part)]
    cache.mkdir(parents=True, exist_ok=True)
    out = torch.zeros(len(captions), 3, 48, 48, dtype=torch.uint8)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [
            (rows, pool.submit(_batch, base, source, [captions[i] for i in rows.tolist()], rows, path, seed))
            for number, (source, rows) in enumerate(batches)
            for path in [cache / f"{number:05d}.pt"]
        ]
        for rows, job in tqdm(jobs, desc=cache.name, mininterval=5):
            out[rows] = torch.load(job.result(), weights_only=True)
    return out


def _batch(base: Path, source: Generator, prompts: list[str], keys: Tensor, path: Path, seed: int) -> Path:
    """The file of one batch of images, which are drawn unless it exists."""
    if not path.exists():
        unfinished = path.with_suffix(".tmp")
        torch.save(_images(_backbone(base), source, prompts, keys, seed), unfinished)
        unfinished.rename(path)
    return path


@lru_cache(maxsize=1)
def _backbone(base: Path) -> Any:
    return backbones.load(config.Backbone(family="sd", checkpoint=str(base), channels_last=True), "cpu")


def _images(backbone: Any, source: Generator, prompts: list[str], keys: Tensor, seed: int) -> Tensor:
    schedule = backbone.schedule(source.steps)
    noise = SampleNoise(seed, keys.tolist(), backbone.latent_shape)
    with backbone.inference():
        x_0 = sample_latents(backbone, schedule, prompts, noise, source.guidance, 1.0)
        images = backbone.decode(x_0).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).contiguous()
