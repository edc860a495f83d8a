"""Watching a training: pictures of a few validation prompts at intervals, and the rule that stops it.

They are judged by the scorers of `score`, from which no method learns; never by the preference model or
the oracle. Nothing here changes what is trained: the noise of the pictures has seeds of its own. So scorers
and sampler are no dependencies of the stage in dvc.yaml: they say whether it stops, and another scorer is no
reason to train again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from spo.config import Params, Validation, Variant
from spo.evaluation import plots
from spo.runtime.files import require, write_json
from spo.runtime.launch import is_main_process
from spo.tracking.curve import Curve

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from spo.types import Backbone

PROMPTS = Path("outputs/prompts/validation.txt")
DIVERGENCES = ("kl", "output_distance")  # what methods call their distance to the reference
SEED = 2**20  # of the first picture; far from those of `generate`


class Collapse(ValueError):
    """Training has gone where its rule says to stop."""


class Watch:
    """What `train.run` calls after each iteration."""

    def __init__(
        self,
        settings: Validation,
        judge: Callable[[], tuple[dict[str, list[float]], float, Image.Image]],
        keep: Callable[[Path], None],
        curve: Curve,
        scratch: Path,
        name: str,
        iterations: int,
    ) -> None:
        """
        Args:
            judge: scores by scorer of today's pictures, their diversity, and a row of them.
            keep: writes the model to a folder.
            scratch: lives as long as the stage's checkpoints do: what was at the start, the pictures by
                update in `samples`, and the last good model in `good`.
            name: of the params section.
            iterations: the last is looked at too.
        """
        self.settings, self.judge, self.keep, self.curve = settings, judge, keep, curve
        self.name, self.good, self._last = name, scratch / "good", iterations
        self.samples, self._start = scratch / "samples", scratch / "validation.json"
        self._begun = json.loads(self._start.read_text()) if self._start.exists() else None

    def __call__(self, iteration: int, metrics: Mapping[str, float], updates: int) -> None:
        """
        Raises:
            Collapse: a limit is passed; the line names it and the last good model.
        """
        self._stop(iteration, divergence_passed(metrics, self.settings.max_divergence))
        if iteration % self.settings.every and iteration != self._last:
            return
        scores, diversity, row = self.judge()
        self._show(row, updates)
        if iteration == 0 or self._begun is None:
            self._begun = {"scores": scores, "diversity": diversity}
            if is_main_process():
                write_json(self._start, self._begun)
        start = self._begun
        means = {f"validation/{name}": fmean(values) for name, values in scores.items()}
        self.curve.log({**means, "validation/diversity": diversity}, updates)
        self._stop(iteration, scorers_passed(start["scores"], scores, self.settings.max_fall))
        self._stop(iteration, diversity_passed(start["diversity"], diversity, self.settings.min_diversity))
        if iteration and iteration != self._last and is_main_process():
            self._keep(iteration)

    def _show(self, row: Image.Image, updates: int) -> None:
        if is_main_process():
            self.samples.mkdir(parents=True, exist_ok=True)
            row.save(self.samples / f"{updates:06d}.png")

    def _keep(self, iteration: int) -> None:
        """The folder is whole at every moment, but for one between two renames."""
        fresh = self.good.with_name("good.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        self.keep(fresh)
        write_json(fresh / "iteration.json", iteration)
        shutil.rmtree(self.good, ignore_errors=True)
        fresh.rename(self.good)

    def _stop(self, iteration: int, reason: str | None) -> None:
        if reason is None:
            return
        told = self.good / "iteration.json"
        kept = (
            f"that of iteration {json.loads(told.read_text())} is in {self.good}" if told.exists() else "none"
        )
        raise Collapse(f"{self.name}: stopped at iteration {iteration}: {reason}; last good model: {kept}")


def divergence_passed(metrics: Mapping[str, float], limit: float | None) -> str | None:
    """Why to stop, or None."""
    found = [(name, metrics[name]) for name in DIVERGENCES if name in metrics]
    if limit is None or not found or found[0][1] <= limit:
        return None
    return f"{found[0][0]} to the reference is {found[0][1]:.4g} (max_divergence {limit:g})"


def scorers_passed(
    start: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]], limit: float | None
) -> str | None:
    """The first scorer whose mean paired difference to the start is below -limit standard errors."""
    for name, before in start.items() if limit is not None else ():
        differences = [b - a for a, b in zip(before, now[name], strict=True)]
        mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
        if limit is not None and mean < -limit * error:
            return (
                f"{name} of validation prompts fell by {-mean:.4g}, more than {limit:g} standard errors "
                f"of {error:.2g} (max_fall)"
            )
    return None


def diversity_passed(start: float, now: float, limit: float | None) -> str | None:
    """Why to stop, or None."""
    if limit is None or now >= limit * start:
        return None
    return f"diversity is {now:.4g}, it was {start:.4g} (min_diversity {limit:g})"


def diversity(embeddings: Tensor) -> float:
    """Mean of 1 - cos over pairs of pictures of one prompt; normalised embeddings [prompts,images,D]."""
    images = embeddings.shape[1]
    alike = (embeddings @ embeddings.transpose(1, 2)).sum((1, 2)) - embeddings.square().sum((1, 2))
    return 1 - float((alike / (images * (images - 1))).mean())


def pictures(backbone: Backbone, params: Params, settings: Validation, guidance: float) -> Any:
    """(pictures, prompts): `settings.images` of each of the first validation prompts, together.

    Raises:
        ValueError: too few validation prompts.
    """
    from spo.evaluation.generation import draw

    lines = require(PROMPTS, "validation prompts").read_text().splitlines()[: settings.prompts]
    if len(lines) < settings.prompts:
        raise ValueError(f"{PROMPTS}: {len(lines)} prompts, fewer than align's validation.prompts")
    prompts = [line for line in lines for _ in range(settings.images)]
    seeds = [SEED + i for i in range(len(prompts))]
    found: list[Image.Image] = list(draw(backbone, params, Variant(guidance=guidance), prompts, seeds))
    return found, prompts


def sections(params: Params) -> list[Any]:
    """What the pictures and their scores depend on."""
    return [params.score, params.generate]


def judged(
    backbone: Backbone, params: Params, settings: Validation, item: str
) -> tuple[dict[str, list[float]], float, Image.Image]:
    """Scores of each prompt (means over its pictures) by scorer, the diversity of its pictures, and the first
    picture of each prompt in a row."""
    from spo.evaluation.scoring import held_apart
    from spo.rewards.aesthetic import Aesthetic
    from spo.training.distributed import device

    guidance = getattr(params.generate, item).guidance
    found, prompts = pictures(backbone, params, settings, guidance)
    n = settings.images
    scores = {
        name: [fmean(values[i : i + n]) for i in range(0, len(values), n)]
        for name, values in held_apart(params, found, prompts, device()).items()
    }
    scorer = Aesthetic(params.score.aesthetic, device=device(), batch_size=params.score.batch_size)
    return scores, diversity(scorer.embed(found).unflatten(0, (-1, n))), plots.row(found[::n])
