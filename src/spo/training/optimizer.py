"""Builds AdamW (arXiv 1711.05101) from `config.Optimizer`."""

from collections.abc import Iterable
from typing import Any

import torch

from spo import config


def adamw(parameters: Iterable[torch.nn.Parameter], settings: config.Optimizer) -> torch.optim.Optimizer:
    parameters, betas = list(parameters), (settings.beta1, settings.beta2)
    given: Any = (parameters, settings.learning_rate, betas, settings.epsilon, settings.weight_decay)
    if settings.eight_bit:
        return _eight_bit()(*given)
    fused = True if all(p.is_cuda for p in parameters) else None  # without temporary copies of the weights
    return torch.optim.AdamW(*given, fused=fused)


def check(settings: config.Optimizer) -> None:
    """Refuse what `adamw` would refuse, before any model is loaded."""
    if settings.eight_bit:
        _eight_bit()


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer.eight_bit: needs bitsandbytes, which cannot be imported ({error}); "
            "`pip install bitsandbytes` on a machine with a GPU, or set it to false"
        ) from None
    return AdamW8bit
