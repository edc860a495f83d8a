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
from spo.runtime.files import atomic, read_json, require, write_json
from spo.runtime.launch import is_main_process
from spo.tracking.curve import Curve

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from spo.evaluation.scorers import Scorers
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
    ) -> None:
        """
        Args:
            save: writes the model to a folder.
            scratch: exists as long as the stage's checkpoints; holds the scores at the start, the images by
                iteration in `samples`, the last good model in `good`, and the best one in `best`.
            name: of the params section, for messages.
            iterations: of the training; the last is validated too.
            divergence: the method's metric of the distance to the reference.
        """
        self.settings, self.validate, self.save, self.curve = settings, validate, save, curve
        self.name, self.divergence, self._last = name, divergence, iterations
        self.good, self.best, self.samples = scratch / "good", scratch / "best", scratch / "samples"
        self._start = scratch / "validation.json"

    def resume(self, iteration: int) -> None:
        """Resume from a checkpoint: what was validated later is dropped."""
        if not is_main_process():
            return
        for folder in (self.good, self.best):
            for kept in (folder, _before(folder)):
                if kept.exists() and _mark(kept)["iteration"] > iteration:
                    shutil.rmtree(kept)
            if _before(folder).exists() and not folder.exists():
                _before(folder).rename(folder)
        for image in sorted(self.samples.glob("*.png")):
            if int(image.stem) > iteration:
                image.unlink()

    def __call__(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Validate after some iterations; returns whether it did, as `training.loop.fit` wants to know.

        The main process judges, since it alone is sure to see its files, and the others follow.

        Raises:
            Collapse: a limit was passed; the line names it and the last good model.
        """
        if is_main_process():
            for folder in (self.good, self.best):  # by now the state after it is saved
                shutil.rmtree(_before(folder), ignore_errors=True)
        limit = self.settings.max_divergence
        if limit is not None:
            self._stop(iteration, divergence_passed(self.divergence, metrics, limit))
        if iteration % self.settings.every and iteration != self._last:
            return False
        now = self.validate()
        self._stop(iteration, self._judge(iteration, now) if is_main_process() else None)
        return True

    def _judge(self, iteration: int, now: Validated) -> str | None:
        """Log and save what was validated; returns the reason to stop if a limit was passed."""
        limits = self.settings
        self._save_image(now.row, iteration)
        if iteration == 0:
            write_json(self._start, {"scores": now.scores, "diversity": now.diversity})
        start = read_json(self._start, "scores at the start")
        gain = (
            None if limits.select is None else standardised_gain(start["scores"], now.scores, limits.select)
        )
        self._log(now, gain, iteration)
        reason = scorers_passed(start["scores"], now.scores, limits.max_fall) or diversity_passed(
            start["diversity"], now.diversity, limits.min_diversity
        )
        if reason is not None or iteration == 0:
            return reason
        if iteration != self._last:
            self._save_model(self.good, {"iteration": iteration})
        if gain is not None and gain > self._best_gain():
            self._save_model(self.best, {"iteration": iteration, "gain": gain})
        return None

    def selected(self) -> dict[str, float] | None:
        """Iteration and gain of the model in `best`; None without `select`."""
        return None if self.settings.select is None else _mark(self.best)

    def _best_gain(self) -> float:
        return float(_mark(self.best)["gain"]) if self.best.exists() else -math.inf

    def _log(self, now: Validated, gain: float | None, iteration: int) -> None:
        means = {name: fmean(values) for name, values in now.scores.items()} | now.oracle
        if gain is not None:
            means["gain"] = gain
        row = {**means, "diversity": now.diversity}
        self.curve.log({f"validation/{name}": value for name, value in row.items()}, iteration)

    def _save_image(self, row: Image.Image, iteration: int) -> None:
        self.samples.mkdir(parents=True, exist_ok=True)
        path = self.samples / f"{iteration:06d}.png"
        with atomic(path) as partial:
            row.save(partial, "PNG")

    def _save_model(self, folder: Path, facts: Mapping[str, float]) -> None:
        """Replace a saved model; the one before stays beside it until the state of the training is saved too.

        A process that is killed before that goes on from an earlier state, of which this model is no part.
        """
        fresh = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        self.save(fresh)
        write_json(fresh / MARK, facts)
        if folder.exists():
            shutil.rmtree(_before(folder), ignore_errors=True)
            folder.rename(_before(folder))
        fresh.rename(folder)

    def _stop(self, iteration: int, reason: str | None) -> None:
        """Stop in all processes if the main one has a reason."""
        from spo.training import distributed

        line = None
        if reason is not None and is_main_process():
            good = self.good
            last = f"iteration {_mark(good)['iteration']}, in {good}" if good.exists() else "none"
            line = f"{self.name}: stopped at iteration {iteration}: {reason}; last good model: {last}"
        line = distributed.broadcast(line)
        if line is not None:
            raise Collapse(line)


def _before(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.before")


def _mark(folder: Path) -> Any:
    """What is known of a saved model."""
    return read_json(folder / MARK, "saved model")


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


def validate(
    backbone: Backbone, params: Params, settings: Validation, method: str, scorers: Scorers
) -> Validated:
    """Generate and score validation images."""
    guidance = getattr(params.generate, method).guidance
    images, prompts = generate(backbone, params, settings, guidance)
    n = settings.images
    scores, embeddings = scorers.score(images, prompts)
    columns = {
        name: [fmean(values[i : i + n]) for i in range(0, len(values), n)] for name, values in scores.items()
    }
    oracle = {name: fmean(columns.pop(name)) for name in list(columns) if name.startswith("oracle_")}
    spread = diversity(embeddings.unflatten(0, (-1, n)))
    return Validated(columns, oracle, spread, plots.row(images[::n]))
