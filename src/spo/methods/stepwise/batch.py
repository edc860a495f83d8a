"""Pairs of candidates for one denoising step: as a rollout leaves them, and in batches to train on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from spo.runtime.transfer import send
from spo.training import distributed
from spo.types import Conditioning, UNetBatch


@dataclass(frozen=True, kw_only=True)
class StepPairs:
    """The pairs of B samples at one step of a rollout, valid or not (SPO, Sec. 4.1).

    Both candidates were drawn from x_t. After the first of several inner steps their branches have diverged:
    then the loser was drawn from x_t_lose.
    """

    step: int  # index of x_t's timestep in the schedule
    x_t: Tensor  # [B,C,h,w]
    x_win: Tensor  # [B,C,h,w]
    x_lose: Tensor  # [B,C,h,w]
    valid: Tensor  # bool [B]
    scores: Tensor  # [K,B], of all candidates
    conditioning: Conditioning  # B samples, the same at every step
    log_probs: Tensor  # [B,2], of winner and loser by the rollout
    x_t_lose: Tensor | None = None  # [B,C,h,w]; None: x_t
    output: Tensor | None = None  # [B,C,h,w], guided, of the UNet at x_t; None: not stored

    def following(self, step: int, x_win: Tensor, x_lose: Tensor, log_probs: Tensor) -> Self:
        """The pairs of the next inner step, which has candidates and branches of its own."""
        return replace(
            self,
            step=step,
            x_t=self.x_win,
            x_t_lose=self.x_lose,
            x_win=x_win,
            x_lose=x_lose,
            log_probs=log_probs,
            output=None,
        )


@dataclass(frozen=True, kw_only=True)
class StepBatch(UNetBatch):
    """P pairs of candidates for the step from x_t. Sample p is pair p's.

    Where the branches of pair p have diverged, x_lose[p] was drawn from sample lose_row[p] (a sample of its
    own at the end of the batch), otherwise from sample p.
    """

    x_win: Tensor  # [P,C,h,w]
    x_lose: Tensor  # [P,C,h,w]
    lose_row: Tensor | None = None  # int64 [P]; None: p for every pair
    output: Tensor | None = None  # [P,C,h,w], guided, of the rollout's UNet at x_t; None: not stored
    log_probs: Tensor | None = None  # [P,2], of winner and loser by the rollout; needed in the first update


def gathered(steps: list[StepPairs]) -> list[StepPairs]:
    """The steps of a rollout with the samples of all processes, in the order of their ranks.

    The conditioning is as large as the latents, and sent once.
    """
    if distributed.count() == 1:
        return steps
    tensors = sorted(steps[0].conditioning.tensors.items())  # in the same order in all processes
    conditioning = Conditioning({name: distributed.gather(value) for name, value in tensors})
    return [_gathered(step, conditioning) for step in steps]


def _gathered(step: StepPairs, conditioning: Conditioning) -> StepPairs:
    names = ("x_t", "x_win", "x_lose", "valid", "log_probs", "x_t_lose", "output")
    present = [name for name in names if getattr(step, name) is not None]
    tensors: dict[str, Any] = {name: distributed.gather(getattr(step, name)) for name in present}
    scores = distributed.gather(step.scores.T).T
    return replace(step, **tensors, scores=scores, conditioning=conditioning)


def batch_of(
    steps: Sequence[StepPairs],
    rows: Sequence[int],
    weight: float,
    prompts: Sequence[str],
    timesteps: Tensor,
) -> StepBatch:
    """The pairs at `rows`, P numbers that count the B samples of the first step, then those of the next.

    Stacking copies, so a batch has ordinary tensors even if the rollout ran in inference mode.

    Args:
        prompts: of the B samples.
        timesteps: [N], of the sampler's steps.
    """
    pairs = [(steps[row // len(prompts)], row % len(prompts)) for row in rows]
    diverged = [(step, b) for step, b in pairs if step.x_t_lose is not None]
    samples, x_t = [*pairs, *diverged], [step.x_t[b] for step, b in pairs]
    x_t += [step.x_t_lose[b] for step, b in diverged if step.x_t_lose is not None]
    outputs = [step.output[b] for step, b in pairs if step.output is not None]
    device = timesteps.device
    step_of = send(torch.tensor([step.step for step, _ in samples]), device)
    prompt_of = send(torch.tensor([b for _, b in samples]), device)
    return StepBatch(
        x_t=torch.stack(x_t),
        timesteps=timesteps[step_of],
        conditioning=steps[0].conditioning.select(prompt_of),
        weight=torch.full((len(pairs),), weight, device=device),
        prompts=[prompts[b] for _, b in pairs],
        x_win=torch.stack([step.x_win[b] for step, b in pairs]),
        x_lose=torch.stack([step.x_lose[b] for step, b in pairs]),
        lose_row=send(_lose_rows(pairs), device) if diverged else None,
        output=torch.stack(outputs) if outputs else None,
        log_probs=torch.stack([step.log_probs[b] for step, b in pairs]),
    )


def _lose_rows(pairs: Sequence[tuple[StepPairs, int]]) -> Tensor:
    """The sample int64 [P] from which each loser was drawn; those of diverged branches follow the pairs'."""
    own = torch.tensor([step.x_t_lose is not None for step, _ in pairs])
    return torch.where(own, len(pairs) - 1 + own.cumsum(0), torch.arange(len(pairs)))
