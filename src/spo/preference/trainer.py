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
from spo.diffusion.noise import shuffled
from spo.preference.loss import preference_loss
from spo.training import distributed, loop
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock
from spo.types import Backbone, Batch, LatentPairs, Mean, RewardModel

EVALUATION_BATCH = 64  # pairs


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

    def scores(
        self, latents: tuple[Tensor, Tensor], captions: Sequence[str], timesteps: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores [P] of both images of P pairs, noised to `timesteps` int64 [P] by the noise of `draw`.

        Without noise the images are as they are, and `timesteps` 0.

        Raises:
            ValueError: something on the way is not finite.
        """
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


class LabelObjective:
    """The preference model learns which image of a noised pair the annotator preferred (Sec. 4.2)."""

    def __init__(self, trained: Trained, pairs: LatentPairs, seed: int) -> None:
        self.trained, self.pairs, self.settings, self.seed = trained, pairs, trained.settings, seed
        self.name, self.iterations = trained.name, trained.settings.steps

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.trained.model.parameters() if p.requires_grad]

    def collect(self, iteration: int) -> tuple[list[list[PairBatch]], dict[str, float]]:
        """One update: each process its share, in parts of equal size."""
        count = min(self.settings.batch_size, len(self.pairs.captions))
        distributed.check_shards(count, f"{self.name}.batch_size")
        chosen = distributed.shard(shuffled(len(self.pairs.captions), iteration * count, count, self.seed))
        size = -(-count // self.settings.gradient_accumulation)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [[self._batch(part) for part in parts]], {}

    def _batch(self, chosen: Sequence[tuple[int, int]]) -> PairBatch:
        """The pairs at `chosen`, (epoch, pair) of each."""
        indices = torch.tensor([i for _, i in chosen])
        timesteps, noise = self.trained.draw([f"spm {e} {i}" for e, i in chosen], self.seed)
        return PairBatch(
            weight=self.pairs.weight[indices].to(noise.device),
            timesteps=timesteps,
            prompts=[self.pairs.captions[i] for i in indices.tolist()],
            indices=indices,
            noise=noise,
        )

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Mean]]:
        """Losses [P], and how many clear labels the model agrees with."""
        latents = self.pairs.read(batch.indices)
        score_0, score_1 = self.trained.scores(latents, batch.prompts, batch.timesteps, batch.noise)
        label_0 = self.pairs.label_0[batch.indices].to(score_0.device, non_blocking=True)
        right = ((score_0 > score_1) == (label_0 > 0.5)).float()
        return preference_loss(score_0, score_1, label_0), {"accuracy": Mean(right, (label_0 != 0.5).float())}


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
    parts = decided.split(EVALUATION_BATCH)
    rank, n = distributed.state().process_index, distributed.count()
    report: dict[int, dict[str, float]] = {}
    with tqdm(total=len(parts) * len(timesteps), desc="preference accuracy", unit="batch") as bar:
        for t in timesteps:
            right = torch.zeros((), dtype=torch.int64, device=device)
            for indices in parts[rank::n]:
                captions = [pairs.captions[i] for i in indices.tolist()]
                _, noise = trained.draw([f"evaluation {i}" for i in indices.tolist()], seed)
                at = torch.full((len(indices),), t, device=device)
                scores = trained.scores(pairs.read(indices), captions, at, noise if t else None)
                _check_scores(torch.stack(scores), t, captions)
                first_wins = pairs.label_0[indices].to(device) > 0.5
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
    bad = (~scores.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"preference model: a score is not finite, timestep {timestep}, "
            f"prompt {captions[bad[0]][:100]!r}; train it again"
        )
