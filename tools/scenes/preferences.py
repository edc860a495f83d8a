"""Preference data in Pick-a-Pic's schema: pictures of several generators, judged by many people."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from spo import backbones, config
from spo.diffusion.noise import SampleNoise
from spo.diffusion.rollout import sample_latents
from spo.diffusion.schedule import Schedule
from spo.runtime.files import atomic
from spo.scenes import world
from spo.scenes.annotators import Annotators, blend
from spo.scenes.oracle import Perception, fidelity

ANNOTATORS = 60
ROWS_PER_SHARD = 500
BATCH = 64
PARTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class Generator:
    """One source of pictures, as Pick-a-Pic's models are."""

    name: str
    early: bool  # the undertrained UNet
    guidance: float
    steps: int


GENERATORS = (
    Generator("base-g2", False, 2.0, 20),
    Generator("base-g4", False, 4.0, 20),
    Generator("base-g2-10steps", False, 2.0, 10),
    Generator("base-g1", False, 1.0, 20),
    Generator("early-g3", True, 3.0, 20),
    Generator("early-g5-10steps", True, 5.0, 10),
)


@dataclass(frozen=True)
class Pairs:
    """N compared pairs: pixels uint8 [N,2,3,48,48], generators [N,2], perceived quality [N,2,4] and
    layout [N,2], the judges and their labels."""

    captions: list[str]
    pixels: Tensor
    generators: Tensor
    quality: Tensor
    layout: Tensor
    who: Tensor
    label_0: Tensor


def draw_captions(n: int, seed: int) -> list[str]:
    """n different captions."""
    generator = torch.Generator().manual_seed(seed)
    attributes = world.random_attributes(2 * n + 100, generator)
    return list(dict.fromkeys(world.captions(attributes, generator)))[:n]


def generate(base: Path, early: Path, captions: list[str], which: Tensor, cache: Path, seed: int) -> Tensor:
    """Pictures uint8 [N,3,48,48] of captions by GENERATORS[which[i]]; each batch is kept in `cache`."""
    backbone = backbones.load(config.Backbone(family="sd", checkpoint=str(base), channels_last=True), "cpu")
    weights = _weights(backbone, early)
    out = torch.zeros(len(captions), 3, 48, 48, dtype=torch.uint8)
    rows = [(g, _rows(which == g)) for g in range(len(GENERATORS))]
    batches = [(g, part) for g, index in rows if len(index) for part in index.split(BATCH)]
    cache.mkdir(parents=True, exist_ok=True)
    for number, (g, index) in enumerate(tqdm(batches, desc=cache.name, mininterval=5)):
        kept = cache / f"{number:05d}.pt"
        if not kept.exists():
            for name in PARTS:
                getattr(backbone, name).load_state_dict(weights[GENERATORS[g].early][name])
            pixels = _draw(backbone, GENERATORS[g], [captions[i] for i in index.tolist()], index, seed)
            with atomic(kept) as partial:
                torch.save(pixels, partial)
        out[index] = torch.load(kept, weights_only=True)
    return out


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _weights(backbone: Any, early: Path) -> dict[bool, dict[str, dict[str, Tensor]]]:
    """Of the final (False) and the early (True) model, by part."""
    final = {n: {k: v.clone() for k, v in getattr(backbone, n).state_dict().items()} for n in PARTS}
    first: dict[str, dict[str, Tensor]] = {n: {} for n in PARTS}
    for key, value in load_file(early).items():
        part, name = key.split(".", 1)
        first[part][name] = value.float()
    return {False: final, True: first}


def _draw(backbone: Any, source: Generator, prompts: list[str], keys: Tensor, seed: int) -> Tensor:
    schedule = Schedule.from_config(backbone.scheduler_config, source.steps)
    noise = SampleNoise(seed, keys.tolist(), backbone.latent_shape)
    with backbone.inference():
        x_0 = sample_latents(backbone, schedule, prompts, noise, source.guidance, 1.0)
        images = backbone.decode(x_0).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).contiguous()


def compare(
    base: Path, early: Path, eyes: Perception, n_pairs: int, n_captions: int, cache: Path, seed: int
) -> Pairs:
    """n_pairs comparisons over n_captions captions, each pair by one annotator."""
    generator = torch.Generator().manual_seed(seed)
    texts = draw_captions(n_captions, seed)
    captions = [texts[i] for i in torch.randint(len(texts), (n_pairs,), generator=generator).tolist()]
    which = torch.randint(len(GENERATORS), (n_pairs, 2), generator=generator)
    doubled = [c for c in captions for _ in range(2)]
    pixels = generate(base, early, doubled, which.flatten(), cache, seed)
    quality, log_probs = eyes.perceive(pixels.float() / 127.5 - 1)
    layout = fidelity(log_probs, doubled, soft=True).view(n_pairs, 2)
    quality = quality.view(n_pairs, 2, -1)
    people = Annotators.draw(ANNOTATORS, generator)
    who = torch.randint(ANNOTATORS, (n_pairs,), generator=generator)
    values = [people.value(who, quality[:, i], layout[:, i]) for i in (0, 1)]
    labels = people.compare(who, values[0], values[1], generator)
    return Pairs(captions, pixels.view(n_pairs, 2, *pixels.shape[1:]), which, quality, layout, who, labels)


def statistics(pairs: Pairs) -> dict[str, float | int]:
    """What the labels are like: ties, and how often clear labels agree with what the picture is worth."""
    clear = pairs.label_0 != 0.5
    first_won = pairs.label_0[clear] > 0.5
    averages = blend(pairs.quality.flatten(0, 1), pairs.layout.flatten()).view(-1, 2)
    sides = {"blend": averages, "aesthetics": pairs.quality.mean(2), "layout": pairs.layout}
    report: dict[str, float | int] = {"pairs": len(clear), "captions": len(set(pairs.captions))}
    report["ties"] = round(1 - clear.float().mean().item(), 4)
    for name, value in sides.items():
        agrees = (value[clear, 0] > value[clear, 1]) == first_won
        report[f"agreement_{name}"] = round(agrees.float().mean().item(), 4)
    report["mean_aesthetics"] = round(pairs.quality.mean().item(), 4)
    report["mean_layout"] = round(pairs.layout.mean().item(), 4)
    return report


def write(pairs: Pairs, folder: Path) -> None:
    """Parquet shards with the columns of Pick-a-Pic v2."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(pairs.captions)
    rows = []
    for i, caption in enumerate(pairs.captions):
        jpgs = [_jpg(pairs.pixels[i, side]) for side in (0, 1)]
        uids = [hashlib.sha256(f"{i}/{side}/".encode() + jpgs[side]).hexdigest()[:32] for side in (0, 1)]
        label = pairs.label_0[i].item()
        row = {"are_different": label != 0.5, "best_image_uid": uids[0] if label == 1 else uids[1]}
        if label == 0.5:
            row["best_image_uid"] = "tie"
        row |= {"caption": caption, "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=i)}
        row |= {"has_label": True, "ranking_id": i, "user_id": int(pairs.who[i])}
        for side in (0, 1):
            row |= {f"image_{side}_uid": uids[side], f"image_{side}_url": "", f"jpg_{side}": jpgs[side]}
            row[f"model_{side}"] = GENERATORS[int(pairs.generators[i, side])].name
        row |= {"label_0": label, "label_1": 1 - label, "num_example_per_prompt": counts[caption]}
        rows.append(row)
    for shard, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
        frame = pd.DataFrame(rows[start : start + ROWS_PER_SHARD])
        frame.to_parquet(folder / f"train-{shard:05d}.parquet", index=False)


def _jpg(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.save(buffer, format="JPEG", quality=95, subsampling=0, optimize=True)
    return buffer.getvalue()
