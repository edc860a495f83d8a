"""The cache of encoded preference pairs, shared by the stages that train on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params
from spo.runtime.files import read_json, require
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import SCRATCH

if TYPE_CHECKING:
    from spo.data.latents import EncodedPairs
    from spo.types import Backbone

# what decodes the images and encodes them to latents
CODE = (
    *("backbones/stable_diffusion.py", "data/containers.py", "data/decoding.py"),
    *("data/images.py", "data/latents.py"),
)


def latent_pairs(params: Params, backbone: Backbone, part: str) -> EncodedPairs:
    """Load the pairs of `part` (train or validation) as latents, encoding them if they are not cached.

    Raises:
        ValueError: missing outputs of an earlier stage, or as `latents.encode`.
    """
    from functools import partial

    from spo.data.images import decode_image
    from spo.data.latents import encode
    from spo.data.pairs import read_pairs, shards

    folder = require(Path("outputs/pairs") / part, "preference pairs")
    total = read_json("outputs/pairs/summary.json", "summary of the pairs", keys=[part])[part]
    settings = ["latents", str(backbone.image_size), params.backbone.dtype, _vae(params)]
    seed = params.seed if params.pairs.latents == "sample" else None
    if seed is not None:
        settings.append(f"samples of seed {seed}")
    name = fingerprint(settings, [folder], CODE)
    cache = SCRATCH / "latents" / f"{part}-{name}"
    pairs = [read_pairs(path) for path in shards(folder)]
    decode = partial(decode_image, size=backbone.image_size)
    return encode(pairs, total, backbone, decode, cache, seed)


def _vae(params: Params) -> str:
    """The hashes of the VAE's files from the stage `inputs`; of a single-file checkpoint, its hash."""
    base, *others = read_json("outputs/inputs/base.json", "hashes of the base model", list)
    if params.backbone.vae is not None:
        return str(others[0])
    files = base.get("files", {})
    parts = {name: digest for name, digest in files.items() if name.startswith("vae/")}
    return str(sorted((parts or files).items()) or base)
