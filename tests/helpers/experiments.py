"""The real dvc.yaml and params.yaml in a temporary clone, with stages that take no time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import clones
import pytest
import yaml

from spo.runtime.files import locked

STAND_IN = Path(__file__).with_name("stand_in")


class Experiment:
    """A clone, and the commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ran = folder, folder.parent / f"{folder.name}.ran"

    def run(self, command: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        """A line as a user types it."""
        environment = clones.environment(self.folder) | {"SPO_RAN": str(self._ran)}
        environment["PATH"] = f"{STAND_IN}{os.pathsep}{environment['PATH']}"
        for role in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{role}_NAME": "one", f"GIT_{role}_EMAIL": "one@example.org"}
        # files: the workers of DVC's queue live on for a while, and would hold a pipe open
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            options = {"cwd": self.folder, "env": environment, "stdout": out, "stderr": err, "text": True}
            done = subprocess.run(command, shell=True, input=answer, timeout=1700, **options)
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())

    def __call__(self, command: str, answer: str = "") -> str:
        done = self.run(command, answer)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def stages(self, command: str = "dvc repro") -> list[str]:
        """The stages that a command runs, in their order."""
        self._ran.write_text("")
        self(command)
        return self._ran.read_text().split()

    @property
    def names(self) -> set[str]:
        """Of all stages."""
        return set(yaml.safe_load((self.folder / "dvc.lock").read_text())["stages"])

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {old!r} is there {text.count(old)} times"
        path.write_text(text.replace(old, new))


def settled(factory: pytest.TempPathFactory) -> Experiment:
    """A clone in which every stage has run: made once for all processes of tests, then copied."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "settled"
    with locked(shared / "settled.lock"):
        if not folder.exists():
            _settle(shared / "settling")
            (shared / "settling").rename(folder)
    return Experiment(clones.copy(folder, factory.mktemp("clone") / "project"))


def _settle(folder: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", "--shared", str(clones.ROOT), str(folder)], check=True)
    experiment = Experiment(folder)
    experiment("dvc pull --quiet data.dvc")
    # one commit, and the data in DVC's cache alone: an experiment of DVC copies all that git holds (140 MB)
    shutil.rmtree(folder / ".git")
    shutil.rmtree(folder / ".dvc-seed")
    experiment("git init --quiet --initial-branch main && git remote add origin nowhere")
    experiment("dvc repro --quiet && git add -A && git commit --quiet -m run")


@contextmanager
def restored(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment, and afterwards its files as they were, without a stage that ran meanwhile."""
    yield experiment
    experiment("git checkout --quiet . && dvc checkout --quiet --force")
