"""Training and measuring preference models: on noised pairs of latents, by their labels."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spo.config import LatentPreference, Preference
from spo.data.latents import EncodedPairs
from spo.diffusion import finite
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.noise import shuffled
from spo.runtime.transfer import send
from spo.training import distributed, loop
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.training.placement import lower
from spo.types import Backbone, Batch, Mean, RewardModel


def preference_loss(score_0: Tensor, score_1: Tensor, label_0: Tensor) -> Tensor:
    """Cross-entropy [B] of the labels and the softmax over two scores (PickScore, arXiv 2305.01569, Eq. 1).

    Args:
        score_0: logits [B] of the first image; score_1 of the second.
        label_0: [B], 1, 0 or .5 (tie); log .5 is added to a tie's loss, so that its best value is 0.
    """
    difference = score_0 - score_1
    losses = -label_0 * F.logsigmoid(difference) - (1 - label_0) * F.logsigmoid(-difference)
    return losses + (label_0 == 0.5) * math.log(0.5)


@dataclass(frozen=True)
class NoisedPairs:
    """P pairs of latents, and what noises them."""

    latents: tuple[Tensor, Tensor]  # x_0 [P,C,h,w] of the first and of the second image, as stored
    captions: Sequence[str]
    timesteps: Tensor  # [P]
    noise: Tensor | None  # [P,...] of `PreferenceTask.draw`; None: the images as they are, at t = 0


class PreferenceTask(Protocol):
    """A preference model in training: the inputs that it makes of pairs of latents, and their scores."""

    name: str  # its section of params.yaml, for messages

    @property
    def settings(self) -> Preference | LatentPreference: ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def backbone(self) -> Backbone:
        """The base whose latents the pairs are."""
        ...

    def prepare(self) -> None:
        """Make trainable what settings.trained names."""
        ...

    def draw(self, keys: list[str], seed: int) -> tuple[Tensor, Tensor]:
        """Timesteps [P] and noise [P,...] that belong to the keys of P pairs."""
        ...

    def inputs(self, pairs: NoisedPairs, check: FiniteCheck) -> Tensor:
        """The model's inputs for P pairs [P,2,...], without gradients; `check` notes what must be finite."""
        ...

    def scores(self, inputs: Tensor, captions: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [P] of the first and of the second image."""
        ...

    def reward_model(self) -> RewardModel:
        """The model as it is, for rollouts."""
        ...

    def finish(self) -> None:
        """Bring the trained model into the form that is measured and saved."""
        ...

    def save(self, folder: Path) -> None:
        """Write the trained model."""
        ...


def train(
    task: PreferenceTask,
    pairs: EncodedPairs,
    *,
    seed: int,
    checkpoint: CheckpointStore | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    on_resume: Callable[[int], None] = lambda iteration: None,
    clock: Clock | None = None,
    scale_loss: bool = False,
) -> dict[str, Any]:
    """Train `task.model` in place for settings.steps updates; returns as `training.loop.fit`.

    The captions are encoded before the model is on the device.
    """
    if not len(pairs.captions):
        raise ValueError(f"{task.name}: there are no training pairs; see outputs/pairs/summary.json")
    settings, objective = task.settings, LabelObjective(task, pairs, seed)
    task.backbone.remember_prompts(objective.captions())
    task.model.to(task.backbone.device)
    task.prepare()
    task.model.train()
    summary = loop.fit(
        objective,
        settings.optimizer,
        checkpoints=checkpoint,
        checkpoint_every=settings.checkpoint_every,
        on_metrics=on_metrics,
        on_resume=on_resume,
        clock=clock,
        ema=settings.ema,
        scale_loss=scale_loss,
    )
    task.model.eval()
    return summary


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """P pairs, each noised to its timestep."""

    indices: Tensor  # int64 [P], of the pairs
    noise: Tensor  # [P,...], of `PreferenceTask.draw`
    inputs: Tensor  # [P,2,...], of `PreferenceTask.inputs`
    check: FiniteCheck  # of the inputs of the whole update; the first of its parts hands it on


class LabelObjective:
    """The preference model learns which image of a noised pair the annotator preferred (Sec. 4.2)."""

    def __init__(self, task: PreferenceTask, pairs: EncodedPairs, seed: int) -> None:
        self.task, self.pairs, self.settings, self.seed = task, pairs, task.settings, seed
        self.name, self.iterations = task.name, task.settings.steps
        self.count = min(self.settings.batch_size, len(pairs.captions))  # of an update

    def captions(self) -> list[str]:
        """Those of all pairs that the training draws."""
        drawn = shuffled(len(self.pairs.captions), 0, self.iterations * self.count, self.seed)
        return [self.pairs.captions[i] for i in sorted({i for _, i in drawn})]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.task.model.parameters() if p.requires_grad]

    def collect(self, iteration: int) -> tuple[list[list[PairBatch]], dict[str, float]]:
        """One update: each process its share, in parts of the device's budget.

        The inputs of all parts are computed first, so that the base can leave the device.
        """
        count = self.count
        distributed.check_shards(count, f"{self.name}.batch_size")
        chosen = distributed.shard(shuffled(len(self.pairs.captions), iteration * count, count, self.seed))
        indices = torch.tensor([i for _, i in chosen])
        captions = [self.pairs.captions[i] for i in indices.tolist()]
        timesteps, noise = self.task.draw([f"spm {e} {i}" for e, i in chosen], self.seed)
        check = FiniteCheck()
        inputs = _inputs(self.task, self.pairs, indices, timesteps, noise, check)
        self.task.backbone.rest()
        weight = send(self.pairs.weight[indices], inputs.device)
        size = self.task.backbone.budget.pairs
        parts = [slice(start, start + size) for start in range(0, len(chosen), size)]
        return [
            [
                PairBatch(
                    weight=weight[part],
                    timesteps=timesteps[part],
                    prompts=captions[part],
                    indices=indices[part],
                    noise=noise[part],
                    inputs=inputs[part],
                    check=check,
                )
                for part in parts
            ]
        ], {}

    def loss(self, batch: PairBatch, check: FiniteCheck) -> tuple[Tensor, dict[str, Mean]]:
        """Losses [P], and how many clear labels the model agrees with."""
        check.take(batch.check)
        with lower("pairs"):
            score_0, score_1 = self.task.scores(batch.inputs, batch.prompts, batch.timesteps)
        label_0 = send(self.pairs.label_0[batch.indices], score_0.device)
        right = ((score_0 > score_1) == (label_0 > 0.5)).float()
        return preference_loss(score_0, score_1, label_0), {"accuracy": Mean(right, (label_0 != 0.5).float())}


def _inputs(
    task: PreferenceTask,
    pairs: EncodedPairs,
    indices: Tensor,
    timesteps: Tensor,
    noise: Tensor | None,
    check: FiniteCheck,
) -> Tensor:
    """The model's inputs for the pairs at `indices` int64 [P], in calls of the device's budget."""
    size, parts = max(1, task.backbone.budget.samples // 2), []
    for start in range(0, len(indices), size):
        part = slice(start, start + size)
        captions = [pairs.captions[i] for i in indices[part].tolist()]
        own = None if noise is None else noise[part]
        parts.append(
            task.inputs(NoisedPairs(pairs.read(indices[part]), captions, timesteps[part], own), check)
        )
    return torch.cat(parts)


@torch.no_grad()
def evaluate(
    task: PreferenceTask, pairs: EncodedPairs, timesteps: Sequence[int], *, seed: int
) -> dict[int, dict[str, float]]:
    """Share of clear labels (no ties) that the model agrees with, at each timestep: {t: {accuracy, n}}.

    The noise belongs to the pair, the same at every timestep, so models are compared on the same images; at
    t = 0 the images have no noise.
    """
    task.model.eval()
    device = task.backbone.device
    decided = (pairs.label_0 != 0.5).nonzero().flatten()
    parts = decided.split(max(1, task.backbone.budget.samples // 2))
    rank, n = distributed.state().process_index, distributed.count()
    report: dict[int, dict[str, float]] = {}
    with tqdm(total=len(parts) * len(timesteps), desc="preference accuracy", unit="batch") as bar:
        for t in timesteps:
            right = torch.zeros((), dtype=torch.int64, device=device)
            for indices in parts[rank::n]:
                captions = [pairs.captions[i] for i in indices.tolist()]
                drawn, noise = task.draw([f"evaluation {i}" for i in indices.tolist()], seed)
                at = torch.full_like(drawn, t)
                check = FiniteCheck()
                inputs = _inputs(task, pairs, indices, at, noise if t else None, check)
                scores = task.scores(inputs, captions, at)
                check.note(finite.SCORE, torch.stack(scores, 1), captions, at)
                check.check()
                first_wins = send(pairs.label_0[indices], device) > 0.5
                right += ((scores[0] > scores[1]) == first_wins).sum()
                bar.update(n)
            accuracy = int(distributed.all_reduce_sum(right)) / max(len(decided), 1)
            report[t] = {"accuracy": accuracy, "n": len(decided)}
    return report
