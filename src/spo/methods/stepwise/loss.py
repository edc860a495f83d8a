"""The loss of SPO and LPO on a batch of step pairs (arXiv 2406.04314, Eq. 4).

Departures from the paper (P) or the official code (C):
1. C runs each UNet twice a pair; win and lose share x_t, so one policy and one reference forward give
   all four log-probs. Same numbers.
2. P has no clamp on the log-ratio; C has one; so has this code, written without exp. Same values.
3. P's log-prob sums over latent dimensions; in C and here it is their mean, which sets the scale of beta and
   clip.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.config import Stepwise
from spo.diffusion import ddim
from spo.methods.stepwise.batch import StepBatch
from spo.types import FIRST_UPDATE, NoiseSchedule


def spo_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    *,
    beta: float,
    clip: float,
) -> Tensor:
    """-log sigmoid(beta (r_win - r_lose)) [B] from four log-probs [B] (Eq. 4).

    r = log(policy / reference), clamped to [log(1 - clip), log(1 + clip)]: outside, the gradient is 0. beta
    is large (10 in SPO, 500 in LPO) because these log-probs are means over latent dimensions.
    """
    low, high = math.log(1 - clip), math.log(1 + clip)
    ratio_win = (policy_win - reference_win).clamp(low, high)
    ratio_lose = (policy_lose - reference_lose).clamp(low, high)
    return -F.logsigmoid(beta * (ratio_win - ratio_lose))


def batch_loss(
    policy_output: Tensor,
    reference_output: Tensor,
    batch: StepBatch,
    schedule: NoiseSchedule,
    config: Stepwise,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [P] of two UNet outputs [B,C,h,w] at batch.x_t, and metrics [P]."""
    policy = ddim.transition(schedule, policy_output, batch.timesteps, batch.x_t, config.eta)
    reference = ddim.transition(schedule, reference_output, batch.timesteps, batch.x_t, config.eta)
    log_probs = log_probs_of(policy, batch)
    losses, metrics = pair_loss(log_probs, log_probs_of(reference, batch), config)
    with torch.no_grad():
        divergence = ddim.divergence(policy, reference)[: len(losses)]
    if batch.first:
        metrics |= gauges(metrics, log_probs, batch)
    return losses, {"kl": divergence, **metrics}


def gauges(
    metrics: Mapping[str, Tensor], log_probs: tuple[Tensor, Tensor], batch: StepBatch
) -> dict[str, Tensor]:
    """How far apart [P] log-probs are that would be the same without rounding: those of policy and reference
    before any update, and those that the candidates had in the rollout, whose batches are others.
    """
    assert batch.log_probs is not None
    ratios = torch.stack([metrics["win_log_ratio"], metrics["lose_log_ratio"]])
    changes = torch.stack(log_probs, 1).detach() - batch.log_probs
    return {
        f"{FIRST_UPDATE}policy_to_reference": ratios.abs().amax(0),
        f"{FIRST_UPDATE}rollout_to_policy": changes.abs().amax(1),
    }


def pair_loss(
    policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], config: Stepwise
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [P] of the log-probs [P] of winners and losers by policy and reference, and metrics [P]."""
    losses = spo_loss(*policy, *reference, beta=config.beta, clip=config.clip)
    win, lose = ((one - other).detach() for one, other in zip(policy, reference, strict=True))
    low, high = math.log(1 - config.clip), math.log(1 + config.clip)
    return losses, {
        "win_log_ratio": win,
        "lose_log_ratio": lose,
        "clipped_fraction": torch.stack([(r < low) | (r > high) for r in (win, lose)]).float().mean(0),
        "implicit_accuracy": (win > lose).float(),
    }


def log_probs_of(step: ddim.Transition, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """log p [P] of the winners and of the losers."""
    if batch.lose_row is None:
        return ddim.log_prob(step, batch.x_win), ddim.log_prob(step, batch.x_lose)
    win, lose = step.select(slice(len(batch.x_win))), step.select(batch.lose_row)
    return ddim.log_prob(win, batch.x_win), ddim.log_prob(lose, batch.x_lose)
