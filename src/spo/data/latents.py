"""Preference pairs encoded to latents in a memory-mapped file: random access in constant memory.

All stages that train on the same pairs share this file as a cache.
"""

import errno
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spo.config import Params
from spo.data.images import decode_image
from spo.data.pairs import chunks, read_pairs, shards
from spo.diffusion import finite
from spo.diffusion.noise import SampleNoise
from spo.runtime.files import atomic, locked, read_json, remove_partials, require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.transfer import send
from spo.runtime.workspace import SCRATCH
from spo.training import distributed
from spo.types import Backbone, PreferencePair

LATENTS = "latents.f16"
COMPLETE = "pairs.json"  # written last: [caption, label_0, weight] of each pair
SHARDS = "shards"  # folder of what is encoded, until it is complete
BATCH = 32  # pairs per forward pass of the encoder
FLOAT16 = np.dtype(np.float16)
FLOAT16_MAX = float(np.finfo(np.float16).max)
# what decodes the images and encodes them to latents
CODE = (
    *("backbones/loading.py", "backbones/stable_diffusion.py"),
    *("data/containers.py", "data/decoding.py", "data/images.py", "data/latents.py"),
)


@dataclass(frozen=True)
class EncodedPairs:
    """N labelled pairs; labels (1, 0 or .5) and weights are [N]."""

    latents: np.ndarray  # [N,2,C,h,w], on disk
    captions: list[str]
    label_0: Tensor  # of the first side; that of the second is 1 - label_0
    weight: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of both sides, [B,C,h,w] each."""
        both = torch.from_numpy(self.latents[indices.numpy()].astype(np.float32))
        return both[:, 0], both[:, 1]


def latent_pairs(params: Params, backbone: Backbone, part: str) -> EncodedPairs:
    """Load the pairs of `part` (train or validation) as latents, encoding them if they are not cached."""
    folder = require(Path("outputs/pairs") / part, "preference pairs")
    total = read_json("outputs/pairs/summary.json", "summary of the pairs", keys=[part])[part]
    settings = ["latents", str(backbone.image_size), params.backbone.dtype, _vae(params)]
    seed = params.seed if params.pairs.latents == "sample" else None
    if seed is not None:
        settings.append(f"samples of seed {seed}")
    cache = SCRATCH / "latents" / f"{part}-{fingerprint(settings, [folder], CODE)}"
    decode = partial(decode_image, size=backbone.image_size)
    return encode([read_pairs(path) for path in shards(folder)], total, backbone, decode, cache, seed)


def _vae(params: Params) -> str:
    """The hashes of the VAE's files from the stage `inputs`; of a single-file checkpoint, its hash."""
    base, *others = read_json("outputs/inputs/base.json", "hashes of the base model", list)
    if params.backbone.vae is not None:
        return str(others[0])
    files = base.get("files", {})
    parts = {name: digest for name, digest in files.items() if name.startswith("vae/")}
    return str(sorted((parts or files).items()) or base)


def encode(
    shards: Sequence[Iterable[PreferencePair]],
    total: int,
    backbone: Backbone,
    decode_image: Callable[[bytes], Tensor],
    folder: Path,
    seed: int | None = None,
) -> EncodedPairs:
    """Encode pairs with the backbone's VAE into `folder`, or read a complete cache from it.

    Each of several processes encodes every n-th shard into files of its own; the main one joins these into
    the file that a single process would write. An interrupted encoding resumes after the complete shards.

    Args:
        shards: of the pairs, in order; one that is encoded already is not iterated over.
        total: number of pairs, from the summary of the `pairs` stage.
        decode_image: decodes bytes to an image [3,H,W] in [-1,1].
        folder: the cache, named by a fingerprint of the pairs, the VAE and the seed.
        seed: of samples of the VAE's posterior, whose noise belongs to the image; None: the posterior's mean.
    """
    done, shape = folder / COMPLETE, (2, *backbone.latent_shape)
    job = distributed.broadcast(secrets.token_hex(8))
    encode_files = partial(_encoded, backbone=backbone, decode_image=decode_image, seed=seed)
    share = partial(_encode_share, shards, total, encode_files, folder)
    if not distributed.is_main_process():
        what = "process 0 encodes pairs, or waits for another stage that does"
        distributed.wait_for(lambda: done.exists() or (folder / SHARDS / job).exists(), folder, what)
        share()
        distributed.wait_for(done.exists, folder, "the others encode pairs")
    elif not done.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        message = f"waits for another stage, which encodes the same pairs into {folder}"
        with locked(folder.with_name(f".{folder.name}.lock"), message):
            if not done.exists():
                _begin(folder, total * math.prod(shape) * FLOAT16.itemsize, job)
                share()
                for number in range(len(shards)):
                    distributed.wait_for(_rows(folder, number).exists, folder, "the others encode pairs")
                _join(folder, len(shards), math.prod(shape))
    rows = read_json(done, "encoded pairs", list, then=f"delete {folder}")
    if len(rows) != total:
        raise ValueError(f"{folder}: {len(rows)} pairs, but the summary says {total}; delete this folder")
    latents = np.memmap(folder / LATENTS, FLOAT16, "r", shape=(total, *shape))
    captions, label_0, weight = zip(*rows, strict=True)
    return EncodedPairs(latents, list(captions), torch.tensor(label_0), torch.tensor(weight))


def _begin(folder: Path, size: int, job: str) -> None:
    """Start the other processes of a job, once it is sure that `size` bytes fit on the disk."""
    shards = folder / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    remove_partials(shards)
    size -= sum(path.stat().st_size for path in folder.rglob("*.f16"))
    if size > shutil.disk_usage(folder).free:
        message = f"{os.strerror(errno.ENOSPC)}: the pairs' latents take {size / 1e6:.1f} MB"
        raise OSError(errno.ENOSPC, message, str(folder / LATENTS))
    (shards / job).touch()


def _rows(folder: Path, number: int) -> Path:
    """The captions and labels of a shard, written when its latents are."""
    return folder / SHARDS / f"{number:05d}.json"


def _encode_share(
    shards: Sequence[Iterable[PreferencePair]],
    total: int,
    encode_files: Callable[[list[bytes]], Tensor],
    folder: Path,
) -> None:
    """Encode every n-th shard, unless that is done."""
    n, rank = distributed.count(), distributed.state().process_index
    with tqdm(total=total // n, desc="encode pairs", unit="pair") as bar:
        for number in range(rank, len(shards), n):
            rows = _rows(folder, number)
            # in this order: the rows are deleted once all is complete
            if not rows.exists() and not (folder / COMPLETE).exists():
                with atomic(rows.with_suffix(".f16")) as unfinished, unfinished.open("wb") as file:
                    found = _write(shards[number], encode_files, file, bar)
                    file.flush()
                    os.fsync(file.fileno())
                write_json(rows, found)


def _join(folder: Path, count: int, length: int) -> None:
    """Append the latents of all shards, of `length` numbers a pair, to one file, and join their rows.

    A shard's file is deleted once it is appended, so that the disk holds each shard once. After an
    interruption the deleted ones are in the file already, and a partly appended one is appended again.
    """
    rows: list[list] = []
    with (folder / LATENTS).open("ab") as file:
        for number in range(count):
            shard = _rows(folder, number).with_suffix(".f16")
            if shard.exists():
                file.truncate(len(rows) * length * FLOAT16.itemsize)
                with shard.open("rb") as part:
                    shutil.copyfileobj(part, file)
                file.flush()
                os.fsync(file.fileno())
                shard.unlink()
            rows += read_json(_rows(folder, number), "encoded pairs", list)
    write_json(folder / COMPLETE, rows)
    shutil.rmtree(folder / SHARDS)


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
    pairs: Iterable[PreferencePair], encode_files: Callable[[list[bytes]], Tensor], file: IO[bytes], bar: tqdm
) -> list[tuple[str, float, float]]:
    """Write the latents of a shard; returns its captions, labels and weights."""
    rows = []
    for chunk in chunks(pairs, BATCH):
        encoded = encode_files([image for pair in chunk for image in (pair.image_0, pair.image_1)])
        _check(encoded, [p.caption for p in chunk for _ in range(2)])
        file.write(encoded.numpy().astype(FLOAT16).tobytes())
        rows += [(pair.caption, pair.label_0, pair.weight) for pair in chunk]
        bar.update(len(chunk))
    return rows


def _check(latents: Tensor, captions: list[str]) -> None:
    """Refuse latents that float16 cannot hold."""
    finite.check_finite(finite.ENCODER, latents, captions)
    largest = latents.abs().flatten(1).max(1).values
    row = int(largest.argmax())
    if largest[row] > FLOAT16_MAX:
        raise ValueError(
            f"the {finite.ENCODER} reaches {float(largest[row]):.4g}, beyond float16's {FLOAT16_MAX:.0f}, "
            f"prompt {captions[row][:100]!r}: check the VAE's weights and its scaling_factor"
        )
