"""Validation during training: score images of validation prompts at intervals, stop at limits, keep the best.

Limits and selection go by the scorers of `score`; never by the preference model or the oracle. Where there is
an oracle, its scores of the same images are logged for the report. Validation does not change the training:
its images have seeds of their own.

Departure from the published methods:
1. With `validation.select` the weights of the best validation are the result, by a rule that is fixed
   beforehand and the same for every method; the published recipes take the last weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from spo.config import Params, Validation, Variant
from spo.evaluation import plots
from spo.runtime.files import read_json, require, write_json
from spo.runtime.launch import is_main_process
from spo.tracking.curve import Curve
from spo.tracking.runs import Run

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from spo.types import Backbone

PROMPTS = Path("outputs/prompts/validation.txt")
MARK = "validation.json"  # beside the weights of a saved model: its iteration, and its gain
SEED = 2**20  # of the first image; far from the seeds of `generate`


class Collapse(ValueError):
    """Training passed a limit of its `validation` section."""


@dataclass(frozen=True)
class Validated:
    """What one validation measured."""

    scores: dict[str, list[float]]  # of each prompt, a mean over its images, by scorer
    oracle: dict[str, float]  # means, where there is an oracle
    diversity: float
    row: Image.Image  # the first image of each prompt


class Watch:
    """The validation callback of the training loop, called after each iteration."""

    def __init__(
        self,
        settings: Validation,
        validate: Callable[[], Validated],
        save: Callable[[Path], None],
        curve: Curve,
        scratch: Path,
        name: str,
        iterations: int,
        divergence: str,
        run: Run,
    ) -> None:
        """
        Args:
            save: writes the model to a folder.
            scratch: exists as long as the stage's checkpoints; holds the scores at the start, the images by
                update in `samples`, the last good model in `good`, and the best one in `best`.
            name: of the params section, for messages.
            iterations: of the training; the last is validated too.
            divergence: the method's metric of the distance to the reference.
            run: gets the images by update.
        """
        self.settings, self.validate, self.save, self.curve = settings, validate, save, curve
        self.name, self.divergence, self._last = name, divergence, iterations
        self.good, self.best, self.samples = scratch / "good", scratch / "best", scratch / "samples"
        self._run, self._earlier = run, sorted(self.samples.glob("*.png"))
        self._start = scratch / "validation.json"
        self._start_values = read_json(self._start, "scores of the start") if self._start.exists() else None

    def __call__(self, iteration: int, metrics: Mapping[str, float], updates: int) -> None:
        """
        Raises:
            Collapse: a limit was passed; the line names it and the last good model.
        """
        limits = self.settings
        self._stop(iteration, divergence_passed(self.divergence, metrics, limits.max_divergence))
        if iteration % limits.every and iteration != self._last:
            return
        now = self.validate()
        self._save_images(now.row, updates)
        if iteration == 0 or self._start_values is None:
            self._start_values = {"scores": now.scores, "diversity": now.diversity}
            if is_main_process():
                write_json(self._start, self._start_values)
        start = self._start_values
        gain = (
            None if limits.select is None else standardised_gain(start["scores"], now.scores, limits.select)
        )
        self._log(now, gain, iteration, updates)
        self._stop(iteration, scorers_passed(start["scores"], now.scores, limits.max_fall))
        self._stop(iteration, diversity_passed(start["diversity"], now.diversity, limits.min_diversity))
        if iteration and is_main_process():
            if iteration != self._last:
                self._save_model(self.good, {"iteration": iteration})
            if gain is not None and gain > self._best_gain():
                self._save_model(self.best, {"iteration": iteration, "gain": gain})

    def selected(self) -> dict[str, float] | None:
        """Iteration and gain of the model in `best`; None without `select`."""
        return None if self.settings.select is None else read_json(self.best / MARK, "selected model")

    def _best_gain(self) -> float:
        saved = self.best / MARK
        return float(read_json(saved, "saved model", keys=["gain"])["gain"]) if saved.exists() else -math.inf

    def _log(self, now: Validated, gain: float | None, iteration: int, updates: int) -> None:
        means = {name: fmean(values) for name, values in now.scores.items()} | now.oracle
        if gain is not None:
            means["gain"] = gain
        row = {**means, "diversity": now.diversity, "iteration": iteration}
        self.curve.log({f"validation/{name}": value for name, value in row.items()}, updates)

    def _save_images(self, row: Image.Image, updates: int) -> None:
        if is_main_process():
            self.samples.mkdir(parents=True, exist_ok=True)
            row.save(path := self.samples / f"{updates:06d}.png")
            earlier = [p for p in self._earlier if int(p.stem) < updates]  # of a run that was killed
            for image in (*earlier, path):
                self._run.log_image(image, "validation", int(image.stem))
            self._earlier = []

    def _save_model(self, folder: Path, facts: Mapping[str, float]) -> None:
        """Replace a saved model; its folder is complete except between the two renames."""
        fresh = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        self.save(fresh)
        write_json(fresh / MARK, facts)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    def _stop(self, iteration: int, reason: str | None) -> None:
        if reason is None:
            return
        saved = self.good / MARK
        last = "none"
        if saved.exists():
            last = f"iteration {read_json(saved, 'saved model')['iteration']}, in {self.good}"
        raise Collapse(f"{self.name}: stopped at iteration {iteration}: {reason}; last good model: {last}")


def scores_at(rows: Mapping[int, Mapping[str, float]], iteration: int) -> tuple[int, dict[str, float]]:
    """The update and the scores of the validation after an iteration, from a curve's rows.

    Without such a validation: the last update, and no scores.
    """
    mark, prefix = "validation/iteration", "validation/"
    for step, row in rows.items():
        if row.get(mark) == iteration:
            return step, {k: v for k, v in row.items() if k.startswith(prefix) and k != mark}
    return max(rows, default=0), {}


def divergence_passed(name: str, metrics: Mapping[str, float], limit: float | None) -> str | None:
    """The reason to stop if the divergence from the reference is above the limit, else None."""
    if limit is None or metrics.get(name, 0.0) <= limit:
        return None
    return f"{name} to the reference is {metrics[name]:.4g} (max_divergence {limit:g})"


def standardised_gain(
    start: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]], scorers: Sequence[str]
) -> float:
    """The mean over scorers of a score's mean gain, in standard deviations of its scores at the start.

    So a scorer's units do not decide how much it counts.
    """
    gains = []
    for name in scorers:
        spread = stdev(start[name])
        gains.append((fmean(now[name]) - fmean(start[name])) / spread if spread else 0.0)
    return fmean(gains)


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

    lines = (
        require(PROMPTS, "validation prompts").read_text(encoding="utf-8").splitlines()[: settings.prompts]
    )
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
    return [params.score, params.generate.model_copy(update={"suites": {}, "images_per_prompt": 1})]


def validate(backbone: Backbone, params: Params, settings: Validation, method: str) -> Validated:
    """Generate and score validation images."""
    from spo.evaluation.scoring import score_images
    from spo.rewards.aesthetic import Aesthetic
    from spo.training.distributed import device

    guidance = getattr(params.generate, method).guidance
    images, prompts = generate(backbone, params, settings, guidance)
    n = settings.images
    columns = {
        name: [fmean(values[i : i + n]) for i in range(0, len(values), n)]
        for name, values in score_images(params, images, prompts, device()).items()
    }
    oracle = {name: fmean(columns.pop(name)) for name in list(columns) if name.startswith("oracle_")}
    scorer = Aesthetic(params.score.aesthetic, device=device(), batch_size=params.score.batch_size)
    spread = diversity(scorer.embed(images).unflatten(0, (-1, n)))
    return Validated(columns, oracle, spread, plots.row(images[::n]))
