"""Compared pairs as parquet shards with Pick-a-Pic's columns."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from spo.data.images import decode_image
from spo.ingest.selection import is_validation
from spo.ingest.sources import read_rows
from spo.types import PreferencePair
from tools.scenes.clips import LabelledPairs
from tools.scenes.generation import GENERATORS
from tools.scenes.preferences import Pairs

ROWS_PER_SHARD = 1000
HELD_OUT = 0.15  # of the captions, with all their pairs: as the stage `pairs` splits them by default
QUALITY = 95  # of WebP: half of the bytes of a JPEG at 95 without subsampling


def write(pairs: Pairs, folder: Path) -> None:
    """Parquet shards with the columns of Pick-a-Pic v2; the images are WebP, which `jpg_0` may hold too."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(pairs.captions)
    rows = []
    for i, caption in enumerate(pairs.captions):
        jpgs = [_webp(pairs.pixels[i, side]) for side in (0, 1)]
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


def _webp(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def read(folder: Path) -> tuple[LabelledPairs, LabelledPairs]:
    """Read the shards of `write`, split by caption into the pairs for training and those held out."""
    parts: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    for pair, _ in read_rows(folder):
        assert pair is not None
        parts[is_validation(pair.caption, HELD_OUT)].append(pair)
    return _labelled(parts[0]), _labelled(parts[1])


def _labelled(pairs: list[PreferencePair]) -> LabelledPairs:
    sides = [[pair.image_0 for pair in pairs], [pair.image_1 for pair in pairs]]
    pixels = [torch.stack([_pixels(data) for data in side]) for side in sides]
    labels = torch.tensor([pair.label_0 for pair in pairs])
    return LabelledPairs(pixels[0], pixels[1], [pair.caption for pair in pairs], labels)


def _pixels(data: bytes) -> Tensor:
    return ((decode_image(data) + 1) * 127.5).round().to(torch.uint8)
