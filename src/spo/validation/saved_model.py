"""A model that a training saves on the way: the best one so far, and the last good one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spo.runtime.files import read_json, write_json

FACTS = "validation.json"  # beside the weights: the model's iteration, and its gain


class SavedModel:
    """A folder with weights, which a new model replaces.

    The former model stays beside it until the state of the training is saved too: a process that is killed
    before that resumes from an earlier state, which the new model is ahead of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._former = folder, folder.with_name(f"{folder.name}.former")

    def facts(self) -> Any:
        """The iteration and the gain of the model; None if there is no model."""
        return read_json(self.folder / FACTS, "saved model") if self.folder.exists() else None

    def replace(self, save: Callable[[Path], None], facts: Mapping[str, float]) -> None:
        """Save a model, by a function that writes it to a folder."""
        fresh = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        save(fresh)
        write_json(fresh / FACTS, facts)
        if self.folder.exists():
            self.drop_former()
            self.folder.rename(self._former)
        fresh.rename(self.folder)

    def drop_former(self) -> None:
        """Remove the former model: the state of the training after the new one is saved."""
        shutil.rmtree(self._former, ignore_errors=True)

    def rewind(self, iteration: int) -> None:
        """Remove what was saved after `iteration`, from where the training resumes."""
        for folder in (self.folder, self._former):
            if folder.exists() and read_json(folder / FACTS, "saved model")["iteration"] > iteration:
                shutil.rmtree(folder)
        if self._former.exists() and not self.folder.exists():
            self._former.rename(self.folder)
