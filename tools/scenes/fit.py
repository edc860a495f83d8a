"""The one training loop of the world's models: AdamW, cosine, average of weights, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spo.training.checkpoint import CheckpointStore

EVERY = 200  # steps between checkpoints


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    work: Path,
    seed: int,
    ema: float = 0.0,
    weight_decay: float = 1e-2,
    warm: float = 0.04,
    until: int | None = None,
) -> None:
    """Train `module` in place on `loss(generator)`; the generator depends on (seed, step) alone.

    With `ema` the module ends with the exponential average of its weights. `warm` is the share of the steps
    over which the learning rate rises. `until`: the training ends after so many of the steps; None: all.
    """
    end = steps if until is None else until
    averaged = {k: v.detach().clone() for k, v in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    store, start = CheckpointStore(work / "checkpoints" / name), 0
    if found := store.latest():
        start, state = found
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        averaged = state["averaged"]
    module.train()
    bar = tqdm(range(start, end), initial=start, total=end, desc=name, mininterval=5)
    for step in bar:
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: loss is {value.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(list(module.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * _warm_cosine(step, steps, warm)
        optimizer.step()
        _average(averaged, module, min(ema, step / (step + 10)))
        if (step + 1) % EVERY == 0 or step + 1 == end:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            store.save(step + 1, {**state, "averaged": averaged})
        if step % 25 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
    module.load_state_dict(averaged)
    module.eval()


def _warm_cosine(step: int, steps: int, warm: float) -> float:
    """Share of the learning rate: up over the first `warm` of the steps, then a cosine to zero."""
    if step < warm * steps:
        return (step + 1) / (warm * steps + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm * steps) / ((1 - warm) * steps))


def _average(averaged: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            averaged[key].lerp_(value.detach(), 1 - decay)
        else:
            averaged[key].copy_(value)
