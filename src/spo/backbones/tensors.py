"""Refuse weights that are incomplete or not finite when they are loaded."""

from collections.abc import Iterable

import torch
from torch import nn


def check_names(where: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Refuse files that lack a tensor of the model, or have one that the model does not have."""
    for title, names in (("lacks", sorted(missing)), ("has unknown", sorted(unknown))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{where} {title} tensors: {names[0]}{more}; damaged, or of another model: get it again"
            )


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse NaN and infinity in parameters and buffers of a module; synchronises with the GPU once."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = [name for name, value in tensors.items() if value.is_floating_point() and value.numel()]
    if not names:
        return
    finite = torch.stack([tensors[name].isfinite().all().cpu() for name in names]).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{where}: NaN or infinity in weight {bad[0]}{more}; get the file again")
