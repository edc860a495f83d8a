"""What a saved pipeline announces, and the precision of its weights."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def forget_source(folder: Path) -> None:
    """Remove from the configs of a saved pipeline where it was loaded from, which may be a path."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
            rest = {k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path")}
            file.write_text(json.dumps(rest, indent=2) + "\n", encoding="utf-8")


def on_cpu(module: Any, dtype: torch.dtype) -> Any:
    """A copy of a module with its weights in another precision, for which its device needs no memory."""
    memo: dict[int, Any] = {}
    for weight in module.parameters():
        memo[id(weight)] = torch.nn.Parameter(weight.detach().to(dtype).cpu(), requires_grad=False)
    for value in module.buffers():
        memo[id(value)] = value.to(dtype if value.is_floating_point() else value.dtype).cpu()
    return copy.deepcopy(module, memo)


def announce(file: Path, known: Mapping[str, Any]) -> None:
    """Announce of the noise schedule what the base did: diffusers writes its class's defaults too.

    For SDXL without `timestep_spacing`, say, these are other timesteps than a reader takes for a missing key.
    """
    saved = json.loads(file.read_text(encoding="utf-8"))
    announced = {key: saved[key] for key in saved if key.startswith("_") or key in known}
    file.write_text(json.dumps(announced, indent=2) + "\n", encoding="utf-8")
