"""Supervised fine-tuning on the preferred images: a third method, as small as one can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spo.diffusion.noise import SampleNoise, shuffled
from spo.methods.spec import Cost, MethodSpec
from spo.training.compute import TRAINED
from spo.types import UNetBatch


@dataclass(frozen=True, kw_only=True)
class SftBatch(UNetBatch):
    target: torch.Tensor  # [P,C,h,w]


class Sft:
    guidance = 1.0

    def __init__(self, config, schedule, pairs, seed) -> None:
        self.config, self.schedule, self.pairs, self.seed = config, schedule, pairs, seed
        self.iterations = config.iterations

    def collect(self, backbone, iteration):
        order = shuffled(len(self.pairs.captions), iteration * 4, 4, self.seed)
        indices = torch.tensor([i for _, i in order])
        first, second = self.pairs.read(indices)
        win = torch.where(self.pairs.label_0[indices].view(-1, 1, 1, 1) > 0.5, first, second)
        win = win.to(backbone.device)
        keys = [f"sft {e} {i}" for e, i in order]
        noise = SampleNoise(self.seed, keys, win.shape[1:], backbone.device)
        timesteps = self.schedule.train_timesteps
        timesteps, eps = timesteps[noise.integers(len(timesteps))], noise.draw()
        prompts = [self.pairs.captions[i] for i in indices.tolist()]
        with torch.no_grad():
            conditioning = backbone.encode_prompts(prompts)
        batch = SftBatch(
            x_t=self.schedule.add_noise(win, eps, timesteps),
            timesteps=timesteps,
            conditioning=conditioning,
            weight=self.pairs.weight[indices].to(backbone.device),
            prompts=prompts,
            target=self.schedule.training_target(win, eps, timesteps),
        )
        return [[batch]], {}

    def loss(self, policy, reference, batch):
        distance = (policy - reference).square().flatten(1).mean(1)
        return (policy - batch.target).square().flatten(1).mean(1), {"output_distance": distance}


def _build(params, backbone):
    from spo.data.latents import latent_pairs

    schedule = backbone.schedule(20).to(backbone.device)
    return Sft(params.align.sft, schedule, latent_pairs(params, backbone, "train"), params.seed)


def _cost(params, schedule) -> Cost:
    iterations = params.align.sft.iterations
    samples = 4 * iterations
    return Cost(f"{iterations} updates of 4 images", samples * (1 + TRAINED))


SPEC = MethodSpec(
    name="sft",
    title="Supervised fine-tuning",
    paper="supervised fine-tuning on preferred images",
    reads=("outputs/pairs/train", "outputs/pairs/summary.json"),
    trained_first=(),
    divergence="output_distance",
    build=_build,
    cost=_cost,
)
