"""The batches of the stepwise methods: pairs of candidates for one denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.methods.stepwise import pairs as step_pairs
from spo.runtime.transfer import send
from spo.types import UNetBatch


@dataclass(frozen=True, kw_only=True)
class StepBatch(UNetBatch):
    """P pairs of candidates for the step from x_t. Sample p is pair p's.

    Where the branches of pair p have parted, x_lose[p] was drawn from sample lose_row[p] (a sample of its own
    at the end of the batch), else from sample p.
    """

    x_win: Tensor  # [P,C,h,w]
    x_lose: Tensor  # [P,C,h,w]
    lose_row: Tensor | None = None  # int64 [P]; None: p for every pair
    output: Tensor | None = None  # [P,C,h,w], of the rollout at x_t, guided; None: not kept


def batch_of(rows: step_pairs.Rows, chosen: Tensor, weight: float, prompts: Sequence[str]) -> StepBatch:
    """The pairs at `chosen` int64 [P], on the CPU; row r is of prompt r % len(prompts)."""
    size = len(rows.conditioning)
    captions = [prompts[r % size] for r in chosen.tolist()]
    chosen = send(chosen, rows.x_t.device)
    x_t, samples, lose_row = rows.inputs(chosen)
    return StepBatch(
        x_t=x_t,
        timesteps=rows.timesteps[samples],
        conditioning=rows.conditioning.select(samples % size),
        weight=torch.full((len(chosen),), weight, device=x_t.device),
        prompts=captions,
        x_win=rows.x_win[chosen],
        x_lose=rows.x_lose[chosen],
        lose_row=lose_row,
        output=None if rows.output is None else rows.output[chosen],
    )
