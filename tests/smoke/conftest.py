"""The smoke preset's DAG, run once for all processes of tests; who changes it works on a copy.

Its stages note what they read in `.spo/read` (tests/helpers/recorder).
"""

import os
from pathlib import Path

import clones
import pytest

from spo.runtime.files import locked


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each process has its own copy: dvc locks its folder, even to look at it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _made(tmp_path_factory.mktemp("clone") / "spo")
    shared = tmp_path_factory.getbasetemp().parent / "clone"
    shared.mkdir(exist_ok=True)
    with locked(shared / "lock"):
        if not (shared / "made").exists():
            (shared / "begun").touch(exist_ok=False)  # fails in the others when it failed in the first
            _made(shared / "spo")
            (shared / "made").touch()
    return clones.copy(shared / "spo", tmp_path_factory.mktemp("clone") / "spo")


def _made(folder: Path) -> Path:
    clones.fresh(folder)
    variables = clones.environment(folder, clones.RECORDER)
    variables["PATH"] = f"{clones.FORKED}{os.pathsep}{variables['PATH']}"
    done = clones.run(folder, "dvc", "repro", variables=variables)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


@pytest.fixture
def copy(clone: Path, tmp_path: Path) -> Path:
    return clones.copy(clone, tmp_path / "copy")
