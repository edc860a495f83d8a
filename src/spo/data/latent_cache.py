"""The preference pairs as latents, encoded once for all stages that read them."""

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

# that decodes images and encodes them
CODE = ("backbones/stable_diffusion.py", "data/decoding.py", "data/images.py", "data/latents.py")


def latent_pairs(params: Params, backbone: Backbone, part: str) -> EncodedPairs:
    """The pairs of `part` (train, validation) as latents, encoded once for all stages that read them."""
    from functools import partial

    from spo.data.images import decode_image
    from spo.data.latents import encode
    from spo.data.pairs import read_pairs
    from spo.training import distributed

    folder = require(Path("outputs/pairs") / part, "preference pairs")
    total = read_json("outputs/pairs/summary.json", "summary of the pairs")[part]
    made_by = ("latents", str(backbone.image_size), params.backbone.dtype, _vae(params))
    name = fingerprint(made_by, [folder], CODE)
    decode = partial(decode_image, size=backbone.image_size)
    with distributed.state().main_process_first():
        return encode(read_pairs(folder), total, backbone, decode, SCRATCH / "latents" / f"{part}-{name}")


def _vae(params: Params) -> str:
    """The hashes of the VAE's files, as the stage `inputs` pinned them; of a single file, of all of it."""
    base, *others = read_json("outputs/inputs/base.json", "hashes of the base model")
    if params.backbone.vae is not None:
        return str(others[0])
    files = base.get("files", {})
    parts = {name: digest for name, digest in files.items() if name.startswith("vae/")}
    return str(sorted((parts or files).items()) or base)
