"""Validation during training: score images of a few validation prompts at intervals, and stop at limits.

Images are scored by the scorers of `score`, on which no method is trained; never by the preference model or
the oracle. Validation does not change the training: its images have seeds of their own. Scorers and sampler
are therefore no dependencies of the stage in dvc.yaml: they only decide whether training stops, and another
scorer is no reason to train again.
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
DIVERGENCES = ("kl", "output_distance")  # the methods' metrics of the divergence from the reference
SEED = 2**20  # of the first image; far from the seeds of `generate`


class Collapse(ValueError):
    """Training passed a limit of its `validation` section."""


class Watch:
    """The validation callback of the training loop, called after each iteration."""

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
            judge: generates and scores images: scores by scorer, diversity, and a row of the images.
            keep: writes the model to a folder.
            scratch: exists as long as the stage's checkpoints; holds the scores at the start, the images by
                update in `samples`, and the last good model in `good`.
            name: of the params section, for messages.
            iterations: of the training; the last is validated too.
        """
        self.settings, self.judge, self.keep, self.curve = settings, judge, keep, curve
        self.name, self.good, self._last = name, scratch / "good", iterations
        self.samples, self._start = scratch / "samples", scratch / "validation.json"
        self._start_values = json.loads(self._start.read_text()) if self._start.exists() else None

    def __call__(self, iteration: int, metrics: Mapping[str, float], updates: int) -> None:
        """
        Raises:
            Collapse: a limit was passed; the line names it and the last good model.
        """
        self._stop(iteration, divergence_passed(metrics, self.settings.max_divergence))
        if iteration % self.settings.every and iteration != self._last:
            return
        scores, diversity, row = self.judge()
        self._save_images(row, updates)
        if iteration == 0 or self._start_values is None:
            self._start_values = {"scores": scores, "diversity": diversity}
            if is_main_process():
                write_json(self._start, self._start_values)
        start = self._start_values
        means = {f"validation/{name}": fmean(values) for name, values in scores.items()}
        self.curve.log({**means, "validation/diversity": diversity}, updates)
        self._stop(iteration, scorers_passed(start["scores"], scores, self.settings.max_fall))
        self._stop(iteration, diversity_passed(start["diversity"], diversity, self.settings.min_diversity))
        if iteration and iteration != self._last and is_main_process():
            self._save_model(iteration)

    def _save_images(self, row: Image.Image, updates: int) -> None:
        if is_main_process():
            self.samples.mkdir(parents=True, exist_ok=True)
            row.save(self.samples / f"{updates:06d}.png")

    def _save_model(self, iteration: int) -> None:
        """Replace the last good model; its folder is complete except between the two renames."""
        fresh = self.good.with_name("good.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        self.keep(fresh)
        write_json(fresh / "iteration.json", iteration)
        shutil.rmtree(self.good, ignore_errors=True)
        fresh.rename(self.good)

    def _stop(self, iteration: int, reason: str | None) -> None:
        if reason is None:
            return
        saved = self.good / "iteration.json"
        last = f"iteration {json.loads(saved.read_text())}, in {self.good}" if saved.exists() else "none"
        raise Collapse(f"{self.name}: stopped at iteration {iteration}: {reason}; last good model: {last}")


def divergence_passed(metrics: Mapping[str, float], limit: float | None) -> str | None:
    """The reason to stop if the divergence from the reference is above the limit, else None."""
    known = [(name, metrics[name]) for name in DIVERGENCES if name in metrics]
    if limit is None or not known or known[0][1] <= limit:
        return None
    return f"{known[0][0]} to the reference is {known[0][1]:.4g} (max_divergence {limit:g})"


def scorers_passed(
    start: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]], limit: float | None
) -> str | None:
    """The reason to stop if a score's mean paired difference to the start is below -limit standard errors."""
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
    """The reason to stop if the diversity is below the limit, a fraction of that at the start, else None."""
    if limit is None or now >= limit * start:
        return None
    return f"diversity fell from {start:.4g} to {now:.4g} (min_diversity {limit:g})"


def diversity(embeddings: Tensor) -> float:
    """The mean of 1 - cos over pairs of images of one prompt; normalised embeddings [prompts,images,D]."""
    images = embeddings.shape[1]
    alike = (embeddings @ embeddings.transpose(1, 2)).sum((1, 2)) - embeddings.square().sum((1, 2))
    return 1 - float((alike / (images * (images - 1))).mean())


def generate(backbone: Backbone, params: Params, settings: Validation, guidance: float) -> Any:
    """Generate `settings.images` images of each of the first validation prompts.

    Returns:
        The images, and the prompt of each.

    Raises:
        ValueError: too few validation prompts.
    """
    from spo.evaluation.generation import draw

    lines = require(PROMPTS, "validation prompts").read_text().splitlines()[: settings.prompts]
    if len(lines) < settings.prompts:
        raise ValueError(
            f"{PROMPTS}: {len(lines)} prompts, fewer than the {settings.prompts} of validation.prompts; "
            "lower it or raise prompts.n_validation"
        )
    prompts = [line for line in lines for _ in range(settings.images)]
    seeds = [SEED + i for i in range(len(prompts))]
    images: list[Image.Image] = list(draw(backbone, params, Variant(guidance=guidance), prompts, seeds))
    return images, prompts


def sections(params: Params) -> list[Any]:
    """The sections on which the images and their scores depend."""
    return [params.score, params.generate]


def judged(
    backbone: Backbone, params: Params, settings: Validation, method: str
) -> tuple[dict[str, list[float]], float, Image.Image]:
    """Generate and score validation images.

    Returns:
        Scores of each prompt (means over its images) by scorer, the diversity of the images, and the first
        image of each prompt in a row.
    """
    from spo.evaluation.scoring import score_without_oracle
    from spo.rewards.aesthetic import Aesthetic
    from spo.training.distributed import device

    guidance = getattr(params.generate, method).guidance
    images, prompts = generate(backbone, params, settings, guidance)
    n = settings.images
    scores = {
        name: [fmean(values[i : i + n]) for i in range(0, len(values), n)]
        for name, values in score_without_oracle(params, images, prompts, device()).items()
    }
    scorer = Aesthetic(params.score.aesthetic, device=device(), batch_size=params.score.batch_size)
    return scores, diversity(scorer.embed(images).unflatten(0, (-1, n))), plots.row(images[::n])
