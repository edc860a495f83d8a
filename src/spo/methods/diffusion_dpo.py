"""Diffusion-DPO (arXiv 2311.12908): offline preference pairs, noise-prediction losses (Eq. 14).

Departures from the paper (P) or the official code (C):
1. P's beta T omega(lambda_t) is one constant, as in C: beta / 2 on mean squared errors (not sums).
2. A pair counts with its weight, 1 / num_example_per_prompt in Pick-a-Pic; C gives all the same weight.
3. C draws from the VAE's posterior anew each time it sees an image, and flips some. Here images are encoded
   once: by the posterior's mean, or with `pairs.latents: sample` by one draw. No flips.
4. C replaces a share of the captions by the empty one; here none is replaced.
5. v_prediction models and flows regress their v; C knows epsilon only. Timesteps, of flows
   too, are uniform over those that the model was trained with.
6. P and C fine-tune the whole UNet on batches of 2,048 pairs. The presets sd15 and sdxl have 64 (batch_size)
   and a LoRA like SPO's (null: the whole UNet).
7. C raises the learning rate over 500 updates; the presets have it constant (optimizer.warmup_steps).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.config import DiffusionDpo, Params
from spo.data.latents import EncodedPairs
from spo.diffusion.noise import SampleNoise, shuffled
from spo.methods.spec import Cost, MethodSpec
from spo.runtime.transfer import send
from spo.training import distributed
from spo.training.compute import TRAINED
from spo.types import FIRST_UPDATE, Backbone, Conditioning, NoiseSchedule, UNetBatch


@dataclass(frozen=True, kw_only=True)
class DiffusionDpoBatch(UNetBatch):
    """P pairs as 2P samples: winners, then losers."""

    target_win: Tensor  # [P,C,h,w], what the outputs should be: the noise, or the velocity
    target_lose: Tensor  # [P,C,h,w]


def diffusion_dpo_loss(
    policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor, *, beta: float
) -> Tensor:
    """-log sigmoid(-beta/2 ((policy_win - policy_lose) - (reference_win - reference_lose))) [P].

    Args:
        policy_win: mean squared error [P] of the policy on the preferred image; `lose`: on the other one.
    """
    return -F.logsigmoid(-0.5 * beta * ((policy_win - policy_lose) - (reference_win - reference_lose)))


def batch_loss(
    policy_output: Tensor, reference_output: Tensor, batch: DiffusionDpoBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [P] of two UNet outputs [2P,C,h,w] (winners, then losers), and metrics [P]."""
    targets = torch.cat([batch.target_win, batch.target_lose])
    policy_win, policy_lose = _errors(policy_output, targets)
    reference_win, reference_lose = _errors(reference_output, targets)
    losses = diffusion_dpo_loss(policy_win, policy_lose, reference_win, reference_lose, beta=beta)
    win, lose = (policy_win - reference_win).detach(), (policy_lose - reference_lose).detach()
    distance = _errors(policy_output, reference_output.float())
    gauges = {}
    if batch.first:
        gauges[f"{FIRST_UPDATE}policy_to_reference"] = torch.stack([win, lose]).abs().amax(0)
    return losses, {
        **gauges,
        "win_error_change": win,
        "lose_error_change": lose,
        "output_distance": torch.stack(distance).mean(0).detach(),
        "implicit_accuracy": (win < lose).float(),
    }


def _errors(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors [P] of winners and of losers."""
    win, lose = (output.float() - targets).square().flatten(1).mean(1).chunk(2)
    return win, lose


class DiffusionDpoMethod:
    """Offline batches: encoded pairs, of which both images have the same noise at the same t."""

    def __init__(
        self,
        config: DiffusionDpo,
        schedule: NoiseSchedule,
        pairs: EncodedPairs,
        seed: int,
        guidance: float = 1.0,
    ) -> None:
        """Ties are left out, as in the official code; `schedule` lies on the backbone's device."""
        self.guidance = guidance  # where it is an input of the model
        self.config, self.schedule, self.pairs, self.seed = config, schedule, pairs, seed
        self.iterations = config.iterations
        self._decided = (pairs.label_0 != 0.5).nonzero().flatten().tolist()
        if not self._decided:
            raise ValueError(f"align.diffusion_dpo: none of {len(pairs.label_0)} pairs has a winner")

    def captions(self) -> list[str]:
        """Those of all pairs that the training draws."""
        count = self.iterations * self.config.batch_size
        drawn = {i for _, i in shuffled(len(self._decided), 0, count, self.seed)}
        return [self.pairs.captions[self._decided[i]] for i in sorted(drawn)]

    def loss(
        self, policy: Tensor, reference: Tensor, batch: DiffusionDpoBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `batch_loss`."""
        return batch_loss(policy, reference, batch, self.config.beta)

    def collect(
        self, backbone: Backbone, iteration: int
    ) -> tuple[list[list[DiffusionDpoBatch]], dict[str, float]]:
        """One update of config.batch_size pairs: each process its share, in parts of the device's budget."""
        count = self.config.batch_size
        distributed.check_shards(count, "align.diffusion_dpo.batch_size")
        order = shuffled(len(self._decided), iteration * count, count, self.seed)
        chosen = [(epoch, self._decided[i]) for epoch, i in distributed.shard(order)]
        with backbone.inference():
            conditioning = backbone.encode_prompts([self.pairs.captions[i] for _, i in chosen])
        size = backbone.budget.pairs
        parts = [slice(start, start + size) for start in range(0, len(chosen), size)]
        batches = [self._batch(backbone, chosen[part], conditioning.select(part)) for part in parts]
        return [batches], {"pairs": float(count), "epoch": float(order[-1][0])}

    def _batch(
        self, backbone: Backbone, chosen: Sequence[tuple[int, int]], conditioning: Conditioning
    ) -> DiffusionDpoBatch:
        """The pairs at `chosen`, (epoch, number) of each, and their text."""
        indices = torch.tensor([i for _, i in chosen])
        keys = [f"pair {i} epoch {epoch}" for epoch, i in chosen]
        win, lose = (send(x, backbone.device) for x in self._sides(indices))
        randomness, schedule = SampleNoise(self.seed, keys, win.shape[1:], backbone.device), self.schedule
        trained = schedule.train_timesteps
        timesteps = trained[randomness.integers(len(trained))]
        noise = randomness.draw()
        both = torch.arange(len(chosen), device=backbone.device).repeat(2)
        return DiffusionDpoBatch(
            x_t=torch.cat([schedule.add_noise(x, noise, timesteps) for x in (win, lose)]),
            timesteps=timesteps.repeat(2),
            # indexing copies, so these are ordinary tensors even if made in inference mode
            conditioning=conditioning.select(both),
            weight=send(self.pairs.weight[indices], backbone.device),
            prompts=[self.pairs.captions[i] for _, i in chosen],
            target_win=schedule.training_target(win, noise, timesteps),
            target_lose=schedule.training_target(lose, noise, timesteps),
        )

    def _sides(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the preferred and of the other image, [P,C,h,w] each."""
        first, second = self.pairs.read(indices)
        first_wins = (self.pairs.label_0[indices] > 0.5).view(-1, 1, 1, 1)
        return torch.where(first_wins, first, second), torch.where(first_wins, second, first)


def _build(params: Params, backbone: Backbone) -> DiffusionDpoMethod:
    from spo.data.latents import latent_pairs

    # only the schedule's noise levels matter here, not the timesteps of a sampler
    schedule = backbone.schedule(20).to(backbone.device)
    pairs = latent_pairs(params, backbone, "train")
    guidance = params.generate.variant("diffusion_dpo").guidance if params.backbone.guidance_is_input else 1.0
    section = params.align.section("diffusion_dpo")
    method = DiffusionDpoMethod(section, schedule, pairs, params.seed, guidance)
    backbone.remember_prompts(method.captions())
    return method


def _cost(params: Params, schedule: Callable[[int], NoiseSchedule]) -> Cost:
    config = params.align.section("diffusion_dpo")
    samples = config.iterations * 2 * config.batch_size  # by the reference, and by the policy
    return Cost(f"{config.iterations} updates of {config.batch_size} pairs", samples * (1 + TRAINED))


SPEC = MethodSpec(
    name="diffusion_dpo",
    title="Diffusion-DPO",
    paper="Diffusion-DPO (arXiv 2311.12908)",
    reads=("outputs/pairs/train", "outputs/pairs/summary.json"),
    trained_first=(),
    divergence="output_distance",
    build=_build,
    cost=_cost,
)
