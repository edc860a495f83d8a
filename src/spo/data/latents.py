"""Preference pairs encoded to latents in a memory-mapped file: random access in constant memory."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spo.diffusion import finite
from spo.diffusion.noise import SampleNoise
from spo.runtime.files import locked, read_json, write_json
from spo.runtime.transfer import send
from spo.types import Backbone, PreferencePair

COMPLETE = "pairs.json"  # written last: captions and labels
BATCH = 32  # pairs per forward pass of the encoder
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class EncodedPairs:
    """N labelled pairs; labels and weights are [N], label_0 + label_1 = 1."""

    latents: np.ndarray  # [N,2,C,h,w], on disk
    captions: list[str]
    label_0: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def label_1(self) -> Tensor:
        return 1 - self.label_0

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of both sides, [B,C,h,w] each."""
        both = torch.from_numpy(self.latents[indices.numpy()].astype(np.float32))
        return both[:, 0], both[:, 1]

    def take(self, n: int) -> EncodedPairs:
        """The first n pairs."""
        return EncodedPairs(self.latents[:n], self.captions[:n], self.label_0[:n], self.weight[:n])


def encode(
    pairs: Iterable[PreferencePair],
    total: int,
    backbone: Backbone,
    decode_image: Callable[[bytes], Tensor],
    folder: Path,
    seed: int | None = None,
) -> EncodedPairs:
    """Encode pairs with the backbone's VAE into `folder`, or read a complete cache from it.

    Of several processes one encodes, and the others wait for it.

    Args:
        total: number of pairs, from the summary of the `pairs` stage.
        decode_image: decodes bytes to an image [3,H,W] in [-1,1].
        folder: the cache, named by a fingerprint of the pairs, the VAE and the seed.
        seed: of samples of the VAE's posterior, whose noise belongs to the image; None: the posterior's mean.

    Raises:
        ValueError: latents that are NaN, infinite or beyond the range of float16, or another number of pairs.
    """
    done = folder / COMPLETE
    shape = (total, 2, *backbone.latent_shape)
    if not done.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        message = f"waits for another stage, which encodes the same pairs into {folder}"
        with locked(folder.with_name(f".{folder.name}.lock"), message):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                file = _allocate(folder / "latents.f16", shape)
                rows = _write(pairs, backbone, decode_image, file, seed)
                file.flush()  # before anyone takes it for complete
                write_json(done, rows)
    rows = read_json(done, "encoded pairs", keys=("captions", "label_0", "weight"), then=f"delete {folder}")
    if len(rows["captions"]) != total:
        raise ValueError(
            f"{folder}: {len(rows['captions'])} pairs, but the summary says {total}; delete this folder"
        )
    latents = np.memmap(folder / "latents.f16", np.float16, "r", shape=shape)
    return EncodedPairs(
        latents, rows["captions"], torch.tensor(rows["label_0"]), torch.tensor(rows["weight"])
    )


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Map a float16 file and reserve its disk space: a page fault on a full disk kills the process.

    Raises:
        OSError: not enough space on the disk.
    """
    size = math.prod(shape) * np.dtype(np.float16).itemsize
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            message = f"{error.strerror}: the pairs' latents take {size / 1e6:.1f} MB"
            raise OSError(error.errno, message, str(path)) from None
    return np.memmap(path, np.float16, "r+", shape=shape)


def _check(latents: Tensor, captions: list[str]) -> None:
    """Refuse latents that float16 cannot hold.

    Raises:
        ValueError: as `encode`.
    """
    finite.check_finite(finite.ENCODER, latents, captions)
    largest = latents.abs().flatten(1).max(1).values
    row = int(largest.argmax())
    if largest[row] > FLOAT16_MAX:
        raise ValueError(
            f"the {finite.ENCODER} reaches {float(largest[row]):.4g}, beyond float16's {FLOAT16_MAX:.0f}, "
            f"prompt {captions[row][:100]!r}: check the VAE's weights and its scaling_factor"
        )


def _encoded(
    files: list[bytes], backbone: Backbone, decode_image: Callable[[bytes], Tensor], seed: int | None
) -> Tensor:
    """The latents [B,C,h,w] of B image files, on the CPU."""
    images = send(torch.stack([decode_image(file) for file in files]), backbone.device)
    noise = []
    if seed is not None:
        keys = [f"latents {hashlib.sha256(file).hexdigest()}" for file in files]
        noise = [SampleNoise(seed, keys, backbone.latent_shape, backbone.device).draw()]
    with backbone.inference():
        return backbone.encode(images, *noise).float().cpu()


def _write(
    pairs: Iterable[PreferencePair],
    backbone: Backbone,
    decode_image: Callable[[bytes], Tensor],
    latents: np.ndarray,
    seed: int | None,
) -> dict[str, list]:
    rows: dict[str, list] = {"captions": [], "label_0": [], "weight": []}
    chunk: list[PreferencePair] = []

    def flush() -> None:
        files = [image for pair in chunk for image in (pair.image_0, pair.image_1)]
        encoded = _encoded(files, backbone, decode_image, seed)
        _check(encoded, [p.caption for p in chunk for _ in range(2)])
        start = len(rows["captions"])
        latents[start : start + len(chunk)] = encoded.view(len(chunk), 2, *encoded.shape[1:]).numpy()
        rows["captions"] += [p.caption for p in chunk]
        rows["label_0"] += [p.label_0 for p in chunk]
        rows["weight"] += [p.weight for p in chunk]
        chunk.clear()

    for pair in tqdm(pairs, total=len(latents), desc="encode pairs", unit="pair"):
        chunk.append(pair)
        if len(chunk) == BATCH:
            flush()
    if chunk:
        flush()
    return rows
