"""Read weights and configs without executing code from them; what does not fit is refused in one line."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from spo.runtime import hub
from spo.runtime.files import read_json
from spo.runtime.messages import first_line

ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by key; those of a .safetensors file are mapped, so only what is used is read."""

    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]  # of a .safetensors file

    def checked(self, key: str, integers: bool = False) -> Tensor:
        """Return a tensor; refuse NaN, infinity and, unless allowed, integers (a quantised model)."""
        value = self.tensors[key]
        kind = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point() and not integers:
            reason = f"is {kind}, not floating point; save the weights in fp16 or fp32"
            raise ValueError(f"{self.file}: {key} {reason}")
        if not torch.isfinite(value.float()).all():
            reason = "has NaN or infinite values; the file is damaged or its training diverged"
            raise ValueError(f"{self.file}: {key} {reason}")
        return value


def read_config(file: Path, key: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object with at least `keys`; `key` is the params key that names the file."""
    try:
        content: dict[str, Any] = read_json(file, "config", keys=keys, then="get it again")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return content


def load_clip(name: str, revision: str | None, key: str) -> Any:
    """Load a complete CLIP in fp32 from a folder or hub id; `key` is the params key that names it."""
    from transformers import CLIPModel

    how: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    where = f"{key}: {name}"
    model, report = hub.reach(where, name, lambda: CLIPModel.from_pretrained(name, **how))
    check_keys(report["missing_keys"], (), where)
    return model


def load_tokenizer(cls: Any, name: str, revision: str | None, key: str, files: str) -> Any:
    """Load a tokenizer of transformers' class `cls` from a folder or hub id, which must have its `files`."""
    tokenizer = hub.reach(
        f"{key}: {name}", name, lambda: cls.from_pretrained(name, revision=revision or "main")
    )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' result for a folder without one
        kind = cls.__name__.removesuffix("Tokenizer").upper()
        raise ValueError(f"{key}: {name} has no {kind} tokenizer ({files})")
    return tokenizer


def load_state(file: Path, where: str) -> Mapping[str, Tensor]:
    """The tensors of a file that must be there."""
    if not file.exists():
        raise ValueError(f"{where}: no such file; run `make repro` or `dvc pull data.dvc`, or download it")
    return read(file, where).tensors


def read(file: Path, where: str | None = None) -> Weights:
    """Read a file; a pickle may hold nothing but tensors by name, at its top or under `state_dict`."""
    state: Any
    metadata: Mapping[str, str] = {}
    where = where or str(file)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}
                metadata = opened.metadata() or {}
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle raise several types
        reason = first_line(error, 200) if file.suffix == ".safetensors" else "not tensors alone"
        raise ValueError(f"{where}: cannot be read as weights ({reason}); save it as .safetensors") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{where}: must be tensors by name, not a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{where}: {key} is a {kind}, not a tensor; save the tensors as .safetensors")
    return Weights(file, {str(key): value for key, value in state.items()}, metadata)


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all weights, in place; none may be missing, unknown or of another shape."""
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes; the second line names the first of them
        raise ValueError(f"{where} does not fit: {str(error).splitlines()[1].strip()[:200]}") from None
    check_keys(result.missing_keys, result.unexpected_keys, where)


def check_keys(missing: Iterable[str], unexpected: Iterable[str], where: str) -> None:
    """Refuse missing and unexpected weights: missing ones would silently stay random."""
    for kind, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"{where} {kind} weights: {keys[0]}{more}; damaged, or not a checkpoint of this model"
            )


def check_image_size(of_model: int, configured: int, key: str) -> None:
    """Compare the configured image size with the model's."""
    if of_model != configured:
        raise ValueError(f"{key}.image_size: is {configured}, but the model's is {of_model}; set {of_model}")
