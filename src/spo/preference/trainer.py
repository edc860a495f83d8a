"""Training and measuring the preference model.

Departures from the official code:
1. `preference.ema` averages the weights over training (0, as published, does not).
2. `preference.trained: heads` leaves the towers as they are (all, as published, trains every weight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spo.config import Preference
from spo.diffusion.denoiser import is_guided
from spo.diffusion.noise import SampleNoise, shuffled
from spo.diffusion.schedule import Schedule
from spo.preference.loss import preference_loss
from spo.preference.model import StepAwarePreferenceModel, token_ids
from spo.preference.noising import clean_pair, noised_pair
from spo.training import distributed, loop
from spo.training.checkpoint import CheckpointStore
from spo.types import Backbone, Batch, LatentPairs, Mean

EVALUATION_BATCH = 64  # pairs


@dataclass(frozen=True)
class Setup:
    """A preference model, and the backbone that shows it what is predicted from noisy latents."""

    model: StepAwarePreferenceModel
    tokenizer: Any
    backbone: Backbone
    schedule: Schedule

    def scores(
        self,
        latents: tuple[Tensor, Tensor],
        captions: Sequence[str],
        timesteps: Tensor,
        noise: Tensor,
        guidance: float,
    ) -> tuple[Tensor, Tensor]:
        """Scores [B] of both images of B pairs, noised alike to `timesteps` int64 [B].

        Raises:
            ValueError: an image is not finite.
        """
        conditioning = self.backbone.encode_prompts(captions)
        schedule = self.schedule.to(self.backbone.device)
        images = noised_pair(
            self.backbone, schedule, latents, timesteps, noise, conditioning, guidance, captions
        )
        return self._scores(images, captions, timesteps)

    def clean_scores(self, latents: tuple[Tensor, Tensor], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores [B] of both images of B pairs without noise, at t = 0; raises as `scores`."""
        images = clean_pair(self.backbone, latents, captions)
        zeros = torch.zeros(len(captions), dtype=torch.int64, device=self.backbone.device)
        return self._scores(images, captions, zeros)

    def _scores(
        self, images: tuple[Tensor, Tensor], captions: Sequence[str], timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        text = self.model.encode_text(token_ids(self.tokenizer, captions, self.model))
        scores = self.model.score_features(torch.cat(images), text.repeat(2, 1), timesteps.repeat(2))
        score_0, score_1 = scores.chunk(2)
        return score_0, score_1


def train(
    setup: Setup,
    pairs: LatentPairs,
    settings: Preference,
    *,
    seed: int,
    checkpoint: CheckpointStore | None = None,
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
) -> dict[str, Any]:
    """Train `setup.model` in place for settings.steps updates; returns as `training.loop.fit`.

    Raises:
        ValueError: there are no pairs.
        FloatingPointError, KeyboardInterrupt: as `training.loop.fit`.
    """
    check_pairs(pairs)
    model = setup.model
    if settings.trained == "heads":
        model.train_heads()
    model.train()
    if settings.gradient_checkpointing:
        model.checkpoint_gradients()
    summary = loop.fit(
        LabelObjective(setup, pairs, settings, seed),
        settings.optimizer,
        checkpoints=checkpoint,
        checkpoint_every=settings.checkpoint_every,
        on_metrics=on_metrics,
        ema=settings.ema,
    )
    model.eval()
    return summary


def unet_samples(settings: Preference) -> int:
    """UNet forwards of one sample in a training; guidance counts twice."""
    each = 2 * (1 + is_guided(settings.guidance)) if settings.noised else 0
    return settings.steps * settings.batch_size * each


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """P pairs, each noised to its timestep."""

    indices: Tensor  # int64 [P], of the pairs
    noise: Tensor  # [P,C,h,w]


class LabelObjective:
    """The preference model learns which image of a noised pair the annotator preferred (Sec. 4.2)."""

    name = "preference"

    def __init__(self, setup: Setup, pairs: LatentPairs, settings: Preference, seed: int) -> None:
        self.setup, self.pairs, self.settings, self.seed = setup, pairs, settings, seed
        self.iterations = settings.steps

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.setup.model.parameters() if p.requires_grad]

    def collect(self, iteration: int) -> tuple[list[list[PairBatch]], dict[str, float]]:
        """One update: each process its share, in parts of equal size."""
        count = min(self.settings.batch_size, len(self.pairs.captions))
        distributed.check_shards(count, "preference.batch_size")
        chosen = distributed.shard(shuffled(len(self.pairs.captions), iteration * count, count, self.seed))
        size = -(-count // self.settings.gradient_accumulation)
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [[self._batch(part) for part in parts]], {}

    def _batch(self, chosen: Sequence[tuple[int, int]]) -> PairBatch:
        """The pairs at `chosen`, (epoch, pair) of each."""
        indices = torch.tensor([i for _, i in chosen])
        timesteps, noise = _draw([f"spm {e} {i}" for e, i in chosen], self.setup, self.seed)
        return PairBatch(
            weight=self.pairs.weight[indices].to(self.setup.backbone.device),
            timesteps=timesteps if self.settings.noised else torch.zeros_like(timesteps),
            prompts=[self.pairs.captions[i] for i in indices.tolist()],
            indices=indices,
            noise=noise,
        )

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Mean]]:
        """Losses [P], and how many clear labels the model agrees with."""
        latents = self.pairs.read(batch.indices)
        if self.settings.noised:
            score_0, score_1 = self.setup.scores(
                latents, batch.prompts, batch.timesteps, batch.noise, self.settings.guidance
            )
        else:
            score_0, score_1 = self.setup.clean_scores(latents, batch.prompts)
        label_0 = self.pairs.label_0[batch.indices].to(score_0.device)
        right = ((score_0 > score_1) == (label_0 > 0.5)).float()
        return preference_loss(score_0, score_1, label_0), {"accuracy": Mean(right, (label_0 != 0.5).float())}


def check_pairs(pairs: LatentPairs) -> None:
    """
    Raises:
        ValueError: there are none.
    """
    if not len(pairs.captions):
        raise ValueError("preference: there are no training pairs; look at outputs/pairs/summary.json")


def _draw(keys: list[str], setup: Setup, seed: int) -> tuple[Tensor, Tensor]:
    """Uniform timesteps int64 [B] and noise [B,C,h,w] that belong to the keys."""
    noise = SampleNoise(seed, keys, setup.backbone.latent_shape, setup.backbone.device)
    return noise.integers(setup.schedule.num_train_timesteps), noise.draw()


@torch.no_grad()
def evaluate(
    setup: Setup, pairs: LatentPairs, timesteps: Sequence[int], guidance: float, *, seed: int
) -> dict[int, dict[str, float]]:
    """Share of clear labels (no ties) that the model agrees with, at each timestep: {t: {accuracy, n}}.

    The noise belongs to the pair and the timestep, so models are compared on the same images.

    Raises:
        ValueError: an image or a score is not finite.
    """
    setup.model.eval()
    device = setup.backbone.device
    decided = (pairs.label_0 != 0.5).nonzero().flatten()
    parts = decided.split(EVALUATION_BATCH)
    rank, n = distributed.state().process_index, distributed.count()
    report: dict[int, dict[str, float]] = {}
    with tqdm(total=len(parts) * len(timesteps), desc="preference accuracy", unit="batch") as bar:
        for t in timesteps:
            right = torch.zeros((), dtype=torch.int64, device=device)
            for indices in parts[rank::n]:
                captions = [pairs.captions[i] for i in indices.tolist()]
                _, noise = _draw([f"evaluation {i}" for i in indices.tolist()], setup, seed)
                at = torch.full((len(indices),), t, device=device)
                scores = setup.scores(pairs.read(indices), captions, at, noise, guidance)
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
