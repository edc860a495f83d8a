"""Diffusion-DPO (arXiv 2311.12908): offline preference pairs, noise-prediction losses (Eq. 14).

Departures from the paper (P) or the official code (C):
1. P's beta T omega(lambda_t) is one constant, as in C: beta / 2 on mean squared errors (not sums).
2. A pair counts with its weight, 1 / num_example_per_prompt in Pick-a-Pic; C counts all alike.
3. The latents are the VAE posterior's mean; C draws from the posterior. No flips.
4. C replaces a share of the captions by the empty one; here none is.
5. v_prediction models regress v; C knows epsilon only.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.config import DiffusionDpo
from spo.diffusion.noise import SampleNoise, shuffled
from spo.diffusion.schedule import Schedule
from spo.training import distributed
from spo.types import Backbone, Batch, Conditioning, LatentPairs


def diffusion_dpo_loss(
    policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor, *, beta: float
) -> Tensor:
    """-log sigmoid(-beta/2 ((policy_win - policy_lose) - (reference_win - reference_lose))) [P].

    Args:
        policy_win: mean squared error [P] of the policy on the preferred image; the others alike.
    """
    return -F.logsigmoid(-0.5 * beta * ((policy_win - policy_lose) - (reference_win - reference_lose)))


def loss(
    policy_output: Tensor,
    reference_output: Tensor,
    batch: Batch,
    schedule: Schedule,
    config: DiffusionDpo,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [P] of two UNet outputs [2P,C,h,w] (winners, then losers), and its metrics (weighted means).

    batch.targets: target_win, target_lose [P,C,h,w], what the outputs should be (noise, or v).
    """
    targets = torch.cat([batch.targets["target_win"], batch.targets["target_lose"]])
    policy_win, policy_lose = _errors(policy_output, targets)
    reference_win, reference_lose = _errors(reference_output, targets)
    losses = diffusion_dpo_loss(policy_win, policy_lose, reference_win, reference_lose, beta=config.beta)
    win, lose = (policy_win - reference_win).detach(), (policy_lose - reference_lose).detach()
    distance = _errors(policy_output, reference_output.float())
    each = {
        "loss": losses.detach(),
        "win_error_change": win,
        "lose_error_change": lose,
        "output_distance": torch.stack(distance).mean(0).detach(),
        "implicit_accuracy": (win < lose).float(),
    }
    share = batch.weight / batch.weight.sum().clamp(min=1e-12)
    return losses, {name: (share * value).sum() for name, value in each.items()}


def _errors(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors [P] of winners and of losers."""
    win, lose = (output.float() - targets).square().flatten(1).mean(1).chunk(2)
    return win, lose


class DiffusionDpoMethod:
    """Offline batches: encoded pairs, both images noised with the same noise at the same t."""

    loss = staticmethod(loss)
    guidance = 1.0

    def __init__(self, config: DiffusionDpo, schedule: Schedule, pairs: LatentPairs, seed: int) -> None:
        """Ties are left out, as in the official code; `schedule` lies on the backbone's device.

        Raises:
            ValueError: every pair is a tie, or there is none.
        """
        self.config, self.schedule, self.pairs, self.seed = config, schedule, pairs, seed
        self.iterations = config.iterations
        self._decided = (pairs.label_0 != 0.5).nonzero().flatten()
        if len(self._decided) == 0:
            raise ValueError(f"align.diffusion_dpo: none of {len(pairs.label_0)} pairs has a winner")

    def collect(self, backbone: Backbone, iteration: int) -> tuple[list[Batch], dict[str, float]]:
        """One update of config.batch_size pairs, in config.gradient_accumulation parts; each process's
        share of them."""
        count = self.config.batch_size
        distributed.check_shards(count, "align.diffusion_dpo.batch_size")
        epoch, _ = (order := shuffled(len(self._decided), iteration * count, count, self.seed))[-1]
        chosen = distributed.shard(order)
        indices = self._decided[torch.tensor([i for _, i in chosen])]
        keys = [f"pair {int(i)} epoch {e}" for (e, _), i in zip(chosen, indices, strict=True)]
        win, lose = (x.to(backbone.device) for x in self._sides(indices))
        randomness = SampleNoise(self.seed, keys, win.shape[1:], backbone.device)
        timesteps = randomness.integers(self.schedule.num_train_timesteps)
        noise = randomness.draw()
        with backbone.inference():
            captions = backbone.encode_prompts([self.pairs.captions[i] for i in indices.tolist()])
        weight = self.pairs.weight[indices].to(backbone.device)
        size = -(-count // self.config.gradient_accumulation)
        parts = torch.arange(len(chosen), device=backbone.device).split(size)
        batches = []
        for part in parts:
            batch = self._batch(part, (win, lose), timesteps, noise, captions)
            told = [self.pairs.captions[i] for i in indices[part.cpu()].tolist()]
            last = part is parts[-1]
            batches.append(replace(batch, weight=weight[part], accumulate=not last, prompts=told))
        return batches, {"pairs": float(count), "epoch": float(epoch)}

    def _batch(
        self,
        part: Tensor,
        sides: tuple[Tensor, Tensor],
        timesteps: Tensor,
        noise: Tensor,
        captions: Conditioning,
    ) -> Batch:
        """The pairs at `part` int64 [p]: 2p samples, winners, then losers."""
        win, lose = (x[part] for x in sides)
        timesteps, noise, schedule = timesteps[part], noise[part], self.schedule
        return Batch(
            x_t=torch.cat([schedule.add_noise(x, noise, timesteps) for x in (win, lose)]),
            timesteps=timesteps.repeat(2),
            # selecting copies, so these are ordinary tensors, whatever `inference` made
            conditioning=captions.select(part.repeat(2)),
            weight=torch.ones(len(part), device=win.device),
            targets={
                "target_win": schedule.training_target(win, noise, timesteps),
                "target_lose": schedule.training_target(lose, noise, timesteps),
            },
        )

    def _sides(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the preferred and of the other image, [P,C,h,w] each."""
        first, second = self.pairs.read(indices)
        first_wins = (self.pairs.label_0[indices] > 0.5).view(-1, 1, 1, 1)
        return torch.where(first_wins, first, second), torch.where(first_wins, second, first)
