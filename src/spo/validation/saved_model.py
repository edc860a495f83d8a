"""A model that is saved during a training: the best one so far, or the last good one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.runtime.files import read_json, write_json

FACTS = "validation.json"  # beside the weights: the model's iteration, and its gain


class SavedModel:
    """The newest of the models in a folder, each in a folder named by its iteration.

    Earlier ones stay until the state of the training is saved too: a process that is killed before that
    resumes from an earlier state, which the newest model is ahead of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self) -> Path | None:
        """The folder of the model; None if there is no model."""
        return max(self._folder.glob("[0-9]*"), default=None)

    def facts(self) -> Any:
        """The iteration and the gain of the model; None if there is no model."""
        path = self.path()
        return read_json(path / FACTS, "saved model") if path else None

    def save(self, write: Callable[[Path], None], iteration: int, **facts: float) -> None:
        """Save a model by a function that writes it to a folder."""
        fresh, path = self._folder / "partial", self._folder / f"{iteration:08d}"
        for folder in (fresh, path):
            shutil.rmtree(folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        write(fresh)
        write_json(fresh / FACTS, {"iteration": iteration, **facts})
        fresh.rename(path)

    def prune(self) -> None:
        """Remove all but the newest model, after the state of the training is saved."""
        for path in sorted(self._folder.glob("[0-9]*"))[:-1]:
            shutil.rmtree(path)

    def rewind(self, iteration: int) -> None:
        """Remove what was saved after `iteration`, from where the training resumes."""
        for path in self._folder.glob("[0-9]*"):
            if int(path.name) > iteration:
                shutil.rmtree(path)
