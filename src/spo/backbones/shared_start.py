"""Compute a UNet's layers before its first attention once for samples that differ only in their text.

The two halves of a guided batch have the same latents and timesteps. A UNet first reads
the text in its attention layers; SDXL's time embedding contains text too, so that only the first convolution
is shared there.

On a CPU a convolution of few samples may sum in another order than one of twice as many. The default model's
predictions are the same to the bit in one and two threads for multiples of 4 (of 1 to 64 samples), so others
are computed as a whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 4  # see above


@contextmanager
def shared_start(unet: Any, batch: int, copies: int) -> Iterator[None]:
    """Within, a forward of `batch` samples in `copies` equal parts computes its start for one part alone.

    With gradient checkpointing it computes all: the backward pass would repeat the start without the hooks.
    """
    hooks = []
    is_exact = batch // copies % SAMPLES == 0
    if copies > 1 and is_exact and not unet.is_gradient_checkpointing:
        for module in _blind_to_text(unet):
            hooks += [
                module.register_forward_pre_hook(partial(_first, copies), with_kwargs=True),
                module.register_forward_hook(partial(_repeated, copies)),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blind_to_text(unet: Any) -> list[nn.Module]:
    """List the modules before the first attention whose inputs are the same for every text, in order."""
    modules = [unet.conv_in]
    if unet.config.addition_embed_type is not None:
        return modules
    for block in unet.down_blocks:
        if hasattr(block, "attentions"):
            return [*modules, block.resnets[0]]
        modules += [*block.resnets, *(block.downsamplers or ())]
    return modules


def _first(
    copies: int, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def part(value: Any) -> Any:
        return value[: len(value) // copies] if isinstance(value, Tensor) else value

    return tuple(map(part, inputs)), {name: part(value) for name, value in named.items()}


def _repeated(copies: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.cat([output] * copies)  # `repeat` would lose channels_last
