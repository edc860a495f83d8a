"""Validation during training: score images of validation prompts at intervals, save the best, end or stop.

A training that gains no more ends (`validation.stop`, `max_clipscore_fall`): its stage succeeds. One that
passes a limit has collapsed: its stage fails.

Limits and selection use the scorers of `score`, never the preference model or the oracle. Where there is
an oracle, its scores of the same images are logged for the report. Validation does not change the training:
its images have seeds of their own.

Departure from the published methods:
1. With `validation.select` the weights of the best validation are the result, by a rule that is fixed
   beforehand and the same for every method; the published recipes take the last weights.
2. With `validation.stop` it also ends the training; the published recipes have a fixed number of iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spo.config import Validation
from spo.runtime.files import atomic, read_json, write_json
from spo.runtime.processes import is_main_process
from spo.validation import limits
from spo.validation.saved_model import SavedModel

if TYPE_CHECKING:
    from spo.tracking.curve import Curve
    from spo.validation.images import Validated


class Collapse(ValueError):
    """Training passed a limit of its `validation` section."""


@dataclass
class Watch:
    """The validation callback of the training loop, called after each iteration."""

    settings: Validation
    validate: Callable[[], Validated]
    save: Callable[[Path], None]  # writes the model to a folder
    curve: Curve
    scratch: Path  # exists as long as the stage's checkpoints
    name: str  # of the params section, for messages
    iterations: int  # of the training; the last is validated too
    divergence: str  # the method's metric of the distance to the reference

    def __post_init__(self) -> None:
        self.good, self.best = SavedModel(self.scratch / "good"), SavedModel(self.scratch / "best")
        self.samples = self.scratch / "samples"  # the images by iteration
        self._scores = self.scratch / "validations"  # measured by each, and why it ended the training
        self.ended: str | None = None  # the reason, in all processes

    def resume(self, iteration: int) -> None:
        """Resume from a checkpoint: what was validated later is removed."""
        if is_main_process():
            self.good.rewind(iteration)
            self.best.rewind(iteration)
            for file in [*self.samples.glob("*.png"), *self._scores.glob("*.json")]:
                if int(file.stem) > iteration:
                    file.unlink()
        self._share(self._validated()[-1]["ended"] if iteration and is_main_process() else None)

    def __call__(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Validate after some iterations; returns whether it did, as `training.loop.fit` expects.

        The main process decides, since it alone is sure to see its files, and the others follow.

        Raises:
            Collapse: a limit was passed; the line names it and the last good model.
        """
        if is_main_process():  # by now the state of the training after these models is saved
            self.good.prune()
            self.best.prune()
        limit = self.settings.max_divergence
        if limit is not None:
            self._stop(iteration, limits.divergence_passed(self.divergence, metrics, limit))
        if iteration % self.settings.every and iteration != self.iterations:
            return False
        now = self.validate()
        self._stop(iteration, self._record(iteration, now) if is_main_process() else None)
        self._share(self._validated()[-1]["ended"] if is_main_process() else None)
        return True

    def selected(self) -> Any:
        """The iteration and the gain of the model in `best`; None without `select`."""
        return None if self.settings.select is None else self.best.facts()

    def _record(self, iteration: int, now: Validated) -> str | None:
        """Log and save what was validated; returns the reason to stop if a limit was passed."""
        settings = self.settings
        with atomic(self.samples / f"{iteration:06d}.png") as partial:
            now.row.save(partial, "PNG")
        measured = {"scores": now.scores, "diversity": now.diversity}
        validations = [*(self._validated() if iteration else []), measured]
        start = validations[0]
        row = {name: fmean(values) for name, values in now.scores.items()} | now.oracle
        gain = None
        if settings.select is not None:
            gain = row["gain"] = limits.standardised_gain(start["scores"], now.scores, settings.select)
        row["diversity"] = now.diversity
        self.curve.log({f"validation/{name}": value for name, value in row.items()}, iteration)
        limited = dict(start["scores"])
        if (
            settings.max_clipscore_fall is not None
        ):  # its own limit, which ends a training and does not fail it
            limited.pop("clipscore")
        reason = limits.scores_passed(limited, now.scores, settings.max_fall) or limits.diversity_passed(
            start["diversity"], now.diversity, settings.min_diversity
        )
        ended = self._end([validation["scores"] for validation in validations]) if iteration else None
        write_json(self._scores / f"{iteration:06d}.json", {**measured, "ended": ended})
        if reason is not None or iteration == 0:
            return reason
        if iteration != self.iterations:
            self.good.save(self.save, iteration)
        best = self.best.facts()
        if gain is not None and (best is None or (ended is None and gain > best["gain"])):
            self.best.save(self.save, iteration, gain=gain)
        return None

    def _end(self, scores: Sequence[limits.Scores]) -> str | None:
        """The reason to end the training after its last validation, else None."""
        fell = limits.clipscore_fell(scores[0], scores[-1], self.settings.max_clipscore_fall)
        if fell is not None or not self.settings.stop or self.settings.select is None:
            return fell
        return limits.no_better(scores, self.settings.select)

    def _validated(self) -> list[Any]:
        """What the validations so far measured, in their order."""
        return [read_json(path, "scores") for path in sorted(self._scores.glob("*.json"))]

    def _share(self, ended: str | None) -> None:
        from spo.training import distributed

        self.ended = distributed.broadcast(ended)

    def _stop(self, iteration: int, reason: str | None) -> None:
        """Stop in all processes if the main one has a reason."""
        from spo.training import distributed

        line = None
        if reason is not None and is_main_process():
            good = self.good.facts()
            last = f"iteration {good['iteration']}, in {self.good.path()}" if good else "none"
            line = f"{self.name}: stopped at iteration {iteration}: {reason}; last good model: {last}"
        line = distributed.broadcast(line)
        if line is not None:
            raise Collapse(line)
