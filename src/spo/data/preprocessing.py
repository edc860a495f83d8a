"""Read how a CLIP preprocesses images: mean and std are applied, steps other than CLIP's are refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo.data.images import CLIP_MEAN, CLIP_STD
from spo.runtime import hub

# the second, of transformers 5, holds the first
FILES = ("preprocessor_config.json", "processor_config.json")
BICUBIC = 3  # Pillow's number
# what CLIP's preprocessing does; a file may leave each out
STEPS: dict[str, Any] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    **{"resample": BICUBIC, "rescale_factor": 1 / 255},
}


class Normalisation(NamedTuple):
    """Mean and standard deviation [3,1,1] of pixels in [0,1]."""

    mean: Tensor
    std: Tensor


OPENAI = Normalisation(CLIP_MEAN, CLIP_STD)


def announced(name: str, revision: str | None, image_size: int, key: str) -> Normalisation:
    """The normalisation that a CLIP's folder or hub id announces; OpenAI's where it has no such file.

    Where only a part of a hub id is in the cache, a line on stderr announces that OpenAI's is used.

    Args:
        image_size: the side of the images that the model takes.
        key: of params.yaml, for messages.
    """
    file, content = _read(name, revision, key)
    where = f"{key}: {name}: {file}"
    for step, value in STEPS.items():
        given = content.get(step, value)
        if given is not None and not (_is_number(given) and math.isclose(given, value, rel_tol=1e-4)):
            raise ValueError(f"{where}: {step} is {given!r}, but only {value!r} is supported")
    for entry in ("size", "crop_size"):
        given = content.get(entry)
        sides = [*given.values()] if isinstance(given, Mapping) else [given]
        stretched = entry == "size" and isinstance(given, Mapping) and "shortest_edge" not in given
        if given is not None and (any(side != image_size for side in sides) or stretched):
            raise ValueError(f"{where}: {entry} is {given!r}, but the shorter side must be {image_size}")
    return read_normalisation(content.get("image_mean"), content.get("image_std"), where)


def read_normalisation(mean: Any, std: Any, where: str) -> Normalisation:
    """Mean and std as a file gives them, of three channels each; None: OpenAI's."""
    if mean is None and std is None:
        return OPENAI
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"{where}: mean and std are {mean} and {std}; both must have three numbers")
    if min(std) <= 0:
        raise ValueError(f"{where}: std is {std}; its numbers must be above 0")
    return Normalisation(*(torch.tensor(values).view(3, 1, 1) for values in (mean, std)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(name: str, revision: str | None, key: str) -> tuple[str, dict[str, Any]]:
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file

    lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    for file in FILES:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_gated_repo=False, **lenient)
        if path is None:
            continue
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{key}: {name}: {file} is damaged ({error}); get it again") from None
        if file == FILES[1] and isinstance(content, dict):
            content = content.get("image_processor", {})
        if not isinstance(content, dict):
            raise ValueError(f"{key}: {name}: {file} is damaged (no mapping); get it again")
        return file, content
    # None: not the hub's answer that it has none, which is in its cache too
    if not Path(name).exists() and try_to_load_from_cache(name, FILES[0], revision=revision) is None:
        hub.say(f"{key}: {name}: no {FILES[0]} in the cache; OpenAI's mean and std are used")
    return FILES[0], {}
