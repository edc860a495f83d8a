"""Training and measuring preference models: on noised pairs of latents, by their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from spo.config import LatentPreference, Preference
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.noise import shuffled
from spo.preference.loss import preference_loss
from spo.runtime.transfer import send
from spo.training import distributed, loop
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.training.placement import lower
from spo.types import Backbone, Batch, LatentPairs, Mean, RewardModel


class Trained(Protocol):
    """A preference model in training, and how it scores pairs of latents."""

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
        """Timesteps int64 [P] and noise [P,...] that belong to the keys of P pairs."""
        ...

    def shown(
        self,
        latents: tuple[Tensor, Tensor],
        captions: Sequence[str],
        timesteps: Tensor,
        noise: Tensor | None,
        check: FiniteCheck,
    ) -> Tensor:
        """What the model scores of P pairs [P,2,...], without gradients: both images, noised to `timesteps`
        int64 [P] by the noise of `draw`.

        Without noise the images are as they are, and `timesteps` 0. `check` notes what must be finite.
        """
        ...

    def scores(self, shown: Tensor, captions: Sequence[str], timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [P] of both images of P pairs."""
        ...

    def reward_model(self) -> RewardModel:
        """The model as it is, to judge candidates."""
        ...

    def finish(self) -> None:
        """Bring the trained model into the form that is measured and saved."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model for the methods that are judged by it."""
        ...


def train(
    trained: Trained,
    pairs: LatentPairs,
    *,
    seed: int,
    checkpoint: CheckpointStore | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    on_resume: Callable[[int], None] = lambda iteration: None,
    clock: Clock | None = None,
    scale_loss: bool = False,
) -> dict[str, Any]:
    """Train `trained.model` in place for settings.steps updates; returns as `training.loop.fit`.

    Raises:
        ValueError: there are no pairs.
        FloatingPointError, KeyboardInterrupt: as `training.loop.fit`.
    """
    if not len(pairs.captions):
        raise ValueError(f"{trained.name}: there are no training pairs; look at outputs/pairs/summary.json")
    settings = trained.settings
    trained.prepare()
    trained.model.train()
    summary = loop.fit(
        LabelObjective(trained, pairs, seed),
        settings.optimizer,
        checkpoints=checkpoint,
        checkpoint_every=settings.checkpoint_every,
        on_metrics=on_metrics,
        on_resume=on_resume,
        clock=clock,
        ema=settings.ema,
        scale_loss=scale_loss,
    )
    trained.model.eval()
    return summary


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """P pairs, each noised to its timestep."""

    indices: Tensor  # int64 [P], of the pairs
    noise: Tensor  # [P,...], as `Trained.draw` gives it
    shown: Tensor  # [P,2,...], as `Trained.shown` gives it
    check: FiniteCheck  # of all that is shown in the update; the first of its parts hands it on


class LabelObjective:
    """The preference model learns which image of a noised pair the annotator preferred (Sec. 4.2)."""

    def __init__(self, trained: Trained, pairs: LatentPairs, seed: int) -> None:
        self.trained, self.pairs, self.settings, self.seed = trained, pairs, trained.settings, seed
        self.name, self.iterations = trained.name, trained.settings.steps

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.trained.model.parameters() if p.requires_grad]

    def collect(self, iteration: int) -> tuple[list[list[PairBatch]], dict[str, float]]:
        """One update: each process its share, in parts of the device's budget.

        What the model sees is computed for all of them first, so that the base can leave the device.
        """
        count = min(self.settings.batch_size, len(self.pairs.captions))
        distributed.check_shards(count, f"{self.name}.batch_size")
        chosen = distributed.shard(shuffled(len(self.pairs.captions), iteration * count, count, self.seed))
        indices = torch.tensor([i for _, i in chosen])
        captions = [self.pairs.captions[i] for i in indices.tolist()]
        timesteps, noise = self.trained.draw([f"spm {e} {i}" for e, i in chosen], self.seed)
        check = FiniteCheck()
        shown = shown_of(self.trained, self.pairs, indices, timesteps, noise, check)
        self.trained.backbone.rest()
        weight = send(self.pairs.weight[indices], shown.device)
        size = self.trained.backbone.budget.pairs
        parts = [slice(start, start + size) for start in range(0, len(chosen), size)]
        return [
            [
                PairBatch(
                    weight=weight[part],
                    timesteps=timesteps[part],
                    prompts=captions[part],
                    indices=indices[part],
                    noise=noise[part],
                    shown=shown[part],
                    check=check,
                )
                for part in parts
            ]
        ], {}

    def loss(self, batch: PairBatch, check: FiniteCheck) -> tuple[Tensor, dict[str, Mean]]:
        """Losses [P], and how many clear labels the model agrees with."""
        check.take(batch.check)
        with lower("pairs"):
            score_0, score_1 = self.trained.scores(batch.shown, batch.prompts, batch.timesteps)
        label_0 = send(self.pairs.label_0[batch.indices], score_0.device)
        right = ((score_0 > score_1) == (label_0 > 0.5)).float()
        return preference_loss(score_0, score_1, label_0), {"accuracy": Mean(right, (label_0 != 0.5).float())}


def shown_of(
    trained: Trained,
    pairs: LatentPairs,
    indices: Tensor,
    timesteps: Tensor,
    noise: Tensor | None,
    check: FiniteCheck,
) -> Tensor:
    """What the model scores of the pairs at `indices` int64 [P], in calls of the device's budget."""
    size, parts = max(1, trained.backbone.budget.samples // 2), []
    for start in range(0, len(indices), size):
        part = slice(start, start + size)
        captions = [pairs.captions[i] for i in indices[part].tolist()]
        own = None if noise is None else noise[part]
        parts.append(trained.shown(pairs.read(indices[part]), captions, timesteps[part], own, check))
    return torch.cat(parts)


@torch.no_grad()
def evaluate(
    trained: Trained, pairs: LatentPairs, timesteps: Sequence[int], *, seed: int
) -> dict[int, dict[str, float]]:
    """Share of clear labels (no ties) that the model agrees with, at each timestep: {t: {accuracy, n}}.

    The noise belongs to the pair, the same at every timestep, so models are compared on the same images; at
    t = 0 the images have no noise.

    Raises:
        ValueError: an image or a score is not finite.
    """
    trained.model.eval()
    device = trained.backbone.device
    decided = (pairs.label_0 != 0.5).nonzero().flatten()
    parts = decided.split(max(1, trained.backbone.budget.samples // 2))
    rank, n = distributed.state().process_index, distributed.count()
    report: dict[int, dict[str, float]] = {}
    with tqdm(total=len(parts) * len(timesteps), desc="preference accuracy", unit="batch") as bar:
        for t in timesteps:
            right = torch.zeros((), dtype=torch.int64, device=device)
            for indices in parts[rank::n]:
                captions = [pairs.captions[i] for i in indices.tolist()]
                _, noise = trained.draw([f"evaluation {i}" for i in indices.tolist()], seed)
                at = torch.full((len(indices),), t, device=device)
                check = FiniteCheck()
                seen = shown_of(trained, pairs, indices, at, noise if t else None, check)
                check.check()
                scores = trained.scores(seen, captions, at)
                _check_scores(torch.stack(scores), t, captions)
                first_wins = send(pairs.label_0[indices], device) > 0.5
                right += ((scores[0] > scores[1]) == first_wins).sum()
                bar.update(n)
            accuracy = int(distributed.all_reduce_sum(right)) / max(len(decided), 1)
            report[t] = {"accuracy": accuracy, "n": len(decided)}
    return report


def _check_scores(scores: Tensor, timestep: int, captions: Sequence[str]) -> None:
    """
    Raises:
        ValueError: of scores [2,B] some are not finite; the first such pair is named.
    """
    if bool(scores.isfinite().all()):
        return
    bad = (~scores.isfinite()).any(0).nonzero().flatten().tolist()
    raise ValueError(
        f"preference model: a score is not finite, timestep {timestep}, "
        f"prompt {captions[bad[0]][:100]!r}; train it again"
    )
