"""GradSPO (NeurIPS 2025): the pairs of SPO, with a distance of predicted noises instead of the log-prob.

The noises that drew winner and loser differ by 2 n. The value of the winner is the negative mean square of
eps_policy - (eps_sampler - g b_t n), where b_t is the factor of eps in x_t (DDPM: sqrt(1 - abar_t)), that of
the loser the same with -n. Their differences to the reference's enter SPO's loss as its log-ratios do.
SPO's log-prob gives the late steps a small weight, this value does not. Rollouts are those of an average of
the policy's weights (`sampler_ema`), and at the sampler's last step every pair is valid, whatever its gap.

Departures from the official code (C; the paper was not compared):
1. C stores the noises of the candidates; here n = (x_win - x_lose) / (2 sigma_t). The same up to rounding.
2. C computes eps_sampler in training, by the average as it is by then; here it is the output of the rollout
   from which the candidates were drawn, which saves a third forward pass. In the difference of the two ratios
   eps_sampler cancels, so that it matters only where one of them is clamped.
3. C is for models that predict eps; here the output of one that predicts v is turned into eps.
"""

from torch import Tensor

from spo.config import Spo
from spo.diffusion import ddim
from spo.methods.stepwise.batch import StepBatch
from spo.methods.stepwise.loss import gauges, log_probs_of, pair_loss
from spo.methods.stepwise.method import StepwiseMethod
from spo.types import NoiseSchedule


class GradSpoMethod(StepwiseMethod):
    """SPO's rollout with the loss of GradSPO; needs config.gradspo."""

    config: Spo
    name = "align.spo"
    store_outputs = every_last_pair = True

    def loss(self, policy: Tensor, reference: Tensor, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `batch_loss`."""
        return batch_loss(policy, reference, batch, self.schedule, self.config)


def batch_loss(
    policy_output: Tensor, reference_output: Tensor, batch: StepBatch, schedule: NoiseSchedule, config: Spo
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [P] of two UNet outputs [P,C,h,w] at batch.x_t, and metrics [P]."""
    assert config.gradspo is not None and batch.output is not None and batch.lose_row is None
    x_t, timesteps = batch.x_t, batch.timesteps
    eps, eps_reference, eps_sampler = (
        schedule.predict(output, timesteps, x_t)[1]
        for output in (policy_output, reference_output, batch.output)
    )
    n = (batch.x_win - batch.x_lose) / (2 * ddim.standard_deviation(schedule, timesteps, config.eta))
    shift = config.gradspo.scale * schedule.noise(timesteps) * n
    values = values_of_pair(eps, eps_sampler, shift)
    losses, metrics = pair_loss(values, values_of_pair(eps_reference, eps_sampler, shift), config)
    policy, reference = (
        ddim.transition(schedule, output.detach(), timesteps, x_t, config.eta)
        for output in (policy_output, reference_output)
    )
    if batch.first:
        metrics |= gauges(metrics, log_probs_of(policy, batch), batch)
    return losses, {"kl": ddim.divergence(policy, reference), **metrics}


def values_of_pair(eps: Tensor, eps_sampler: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The values [P] of winner and loser: -mean (eps - (eps_sampler -+ shift))^2; all else [P,C,h,w]."""
    win, lose = eps_sampler - shift, eps_sampler + shift
    return -(eps - win).square().flatten(1).mean(1), -(eps - lose).square().flatten(1).mean(1)
