"""Refuse weights that are not finite when they are loaded."""

import torch
from torch import nn


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
