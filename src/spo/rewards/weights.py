"""Read the files of a scorer; an error names the params key of a missing, damaged or wrong file."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spo.runtime import hub
from spo.runtime.files import read_json
from spo.runtime.messages import first_line


def reach(loader: Callable[[], Any], name: str, key: str) -> Any:
    """Load a folder or hub id `name`; `key` is the params key that names it."""
    try:
        hub.check(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    try:
        return loader()
    except Exception as error:  # transformers, safetensors and the hub's client raise many types
        raise ValueError(f"{key}: {name} cannot be loaded ({hub.reason(name, error)})") from None


def read_config(file: Path, key: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object with at least `keys`; `key` is the params key that names the file."""
    try:
        content: dict[str, Any] = read_json(file, "config", keys=keys, then="get it again")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return content


def load_tokenizer(cls: Any, name: str, revision: str | None, key: str, files: str) -> Any:
    """Load a tokenizer of transformers' class `cls` from a folder or hub id, which must have its `files`."""
    tokenizer = reach(lambda: cls.from_pretrained(name, revision=revision or "main"), name, key)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' result for a folder without one
        kind = cls.__name__.removesuffix("Tokenizer").upper()
        raise ValueError(f"{key}: {name} has no {kind} tokenizer ({files})")
    return tokenizer


def load_state(file: Path, where: str) -> Mapping[str, Tensor]:
    """Read the weights of a .safetensors file, or of a torch file, at its top or under `state_dict`."""
    if not file.exists():
        raise ValueError(f"{where}: no such file; run `make repro` or `dvc pull data.dvc`, or download it")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise several types
        raise ValueError(f"{where} cannot be read ({first_line(error, 200)})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{where} is not a state dict (weights by name)")
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights, in place; none may be missing, unknown or of another shape."""
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes; the second line names the first of them
        raise ValueError(f"{where} does not fit: {str(error).splitlines()[1].strip()[:200]}") from None
    check_keys(result.missing_keys, result.unexpected_keys, where)


def check_keys(missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Refuse missing and unexpected weights: missing ones would silently stay random."""
    for kind, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{where} {kind} weights: {keys[0]}{more}; not a checkpoint of this model")


def check_image_size(of_model: int, configured: int, key: str) -> None:
    """Compare the configured image size with the model's."""
    if of_model != configured:
        raise ValueError(f"{key}.image_size: is {configured}, but the model's is {of_model}; set {of_model}")
