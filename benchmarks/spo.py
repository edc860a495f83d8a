"""SPO: a whole iteration and its parts, against the official algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Case
from benchmarks.models import SEED, Models, perturb, restore
from benchmarks.official import Official, Pairs
from spo import config
from spo.diffusion.noise import SampleNoise, generator, shuffled
from spo.methods.spo import SpoMethod
from spo.methods.stepwise.batch import StepBatch
from spo.preference.model import ClipRewardModel
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.optimizer import adamw
from spo.training.state import TrainingState

OFFICIAL = "the official algorithm"
SHORT = {"num_inference_steps": 10, "divert_start_step": 1}  # half of the default experiment's rollout


def settings(models: Models, prompts: int, **changes: Any) -> config.Spo:
    """The experiment's SPO with all pairs valid, one iteration, and one step between scorings."""
    always = {"threshold": 0.0, "threshold_end": None, "iterations": 1, "inner_steps": 1}
    always |= {"prompts_per_iteration": prompts}
    return models.params.align.section("spo").model_copy(update={**always, **changes})


class Ours:
    """This package's SPO with the adapter of a fixed seed."""

    def __init__(self, models: Models, how: config.Spo) -> None:
        assert how.lora is not None
        self.models, self.settings = models, how
        models.backbone.add_lora(how.lora, SEED)
        reward_model = ClipRewardModel(models.spm, models.tokenizer)
        schedule = models.schedule(how.num_inference_steps)
        self.method = SpoMethod(how, schedule, reward_model, models.prompts, SEED)
        self.objective = Alignment("align.spo", models.backbone, self.method)
        self.start = perturb(self.objective.parameters())

    def state(self) -> TrainingState:
        """A fresh optimizer, and the adapter as at the start."""
        restore(self.objective.parameters(), self.start)
        return TrainingState(self.objective.parameters(), self.settings.optimizer, 0.0, False)

    def updates(self) -> list[list[StepBatch]]:
        restore(self.objective.parameters(), self.start)
        return self.method.collect(self.models.backbone, 0)[0]

    def iteration(self) -> Tensor:
        """Mean losses of the updates of one iteration."""
        state = self.state()
        updates, _ = self.objective.collect(0)
        return torch.tensor([loop.update(self.objective, parts, state)["loss"] for parts in updates])


class Theirs:
    """The official algorithm with the same adapter, prompts and noise."""

    def __init__(self, models: Models, how: config.Spo, start: list[Tensor], copied: bool = True) -> None:
        self.models, self.settings, self.start = models, how, start
        self.algorithm = Official(models, how, copied)

    def optimizer(self) -> torch.optim.Optimizer:
        restore(self.algorithm.parameters(), self.start)
        return adamw(self.algorithm.parameters(), self.settings.optimizer)

    def batches(self) -> list[Pairs]:
        """The pairs of a rollout, shuffled, in updates."""
        count = self.settings.prompts_per_iteration
        order = shuffled(len(self.models.prompts), 0, count, SEED)
        keys = [f"rollout 0 epoch {epoch} prompt {i}" for epoch, i in order]
        noise = SampleNoise(SEED, keys, self.models.backbone.latent_shape, self.models.backbone.device)
        pairs = self.algorithm.rollout([self.models.prompts[i] for _, i in order], noise)
        rows = torch.randperm(len(pairs.x_t), generator=generator(SEED, "pairs 0"))
        return [pairs.take(part) for part in rows.to(pairs.x_t.device).split(self.settings.batch_size)]

    def iteration(self) -> Tensor:
        optimizer = self.optimizer()
        return torch.tensor([self.algorithm.update(batch, optimizer) for batch in self.batches()])


def cases(models: Models, how: config.Spo, tolerance: float = 1e-4) -> Iterator[Case]:
    """Whole rollout, decoding, scoring, one update, whole iteration."""
    theirs = Theirs(models, how, [])
    ours = Ours(models, how)
    theirs.start = ours.start
    count = how.prompts_per_iteration

    def rollout_ours() -> Tensor:
        return torch.cat([b.x_win for (b,) in ours.updates()])

    def rollout_theirs() -> Tensor:
        restore(theirs.algorithm.parameters(), theirs.start)
        return torch.cat([b.following[:, 0] for b in theirs.batches()])

    yield Case(
        "rollout, decoding and preference scores",
        OFFICIAL,
        "prompt",
        count,
        rollout_ours,
        rollout_theirs,
        tolerance,
    )
    yield from _parts(models, how, theirs, tolerance)
    yield _update(ours, theirs, tolerance)
    yield Case("iteration", OFFICIAL, "iteration", 1, ours.iteration, theirs.iteration, tolerance)


@dataclass(frozen=True)
class _Images:
    """Images as the reward model reads them from candidates."""

    images: Tensor
    timesteps: Tensor


def _parts(models: Models, how: config.Spo, theirs: Theirs, tolerance: float) -> Iterator[Case]:
    """Decoding and scoring the K candidates of every prompt at one step."""
    prompts = models.some_prompts(how.prompts_per_iteration)
    count, official = how.candidates * len(prompts), theirs.algorithm
    device = models.backbone.device
    latents = SampleNoise(SEED, range(count), models.backbone.latent_shape, device).draw()
    timesteps = torch.full((count,), 501, device=device)

    def decode_ours() -> Tensor:
        return models.backbone.decode(latents)

    yield Case("decoding", OFFICIAL, "image", count, decode_ours, lambda: official.decode(latents), tolerance)
    reward_model = ClipRewardModel(models.spm, models.tokenizer)
    text = reward_model.encode_text(prompts).repeat(how.candidates)
    seen: Any = _Images(decode_ours(), timesteps)

    def score_theirs() -> Tensor:
        return official.score(seen.images, prompts * how.candidates, timesteps)

    yield Case(
        "preference scores",
        OFFICIAL,
        "image",
        count,
        lambda: reward_model.score(seen, text),
        score_theirs,
        tolerance,
    )


def _update(ours: Ours, theirs: Theirs, tolerance: float) -> Case:
    """One optimizer update on the same pairs; equal if the loss and the clipped gradients are. (Not the new
    weights: AdamW's first step turns the sign of a gradient that is all rounding into a step.)"""
    parts, batch = ours.updates()[0], theirs.batches()[0]

    def update_ours() -> Tensor:
        state = ours.state()
        return outcome(loop.update(ours.objective, parts, state)["loss"], ours.objective.parameters())

    def update_theirs() -> Tensor:
        loss = theirs.algorithm.update(batch, theirs.optimizer())
        return outcome(loss, theirs.algorithm.parameters())

    name = f"training step of {len(batch.x_t)} pairs"
    return Case(name, OFFICIAL, "pair", len(batch.x_t), update_ours, update_theirs, tolerance)


def outcome(loss: float, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The loss and the gradients of an update in one vector."""
    gradients = [p.grad.flatten().cpu() for p in parameters if p.grad is not None]
    return torch.cat([torch.tensor([loss]), *gradients])
