"""The smoke preset's DAG, run once for all tests; who changes it works on a copy."""

import os
from pathlib import Path

import clones
import pytest


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "PYTEST_XDIST_WORKER" in os.environ:
        (tmp_path_factory.getbasetemp().parent / "clone").mkdir()  # fails if a second process made one too
    folder = clones.fresh(tmp_path_factory.mktemp("clone") / "spo")
    clones.must(folder, "dvc", "repro")
    return folder


@pytest.fixture
def copy(clone: Path, tmp_path: Path) -> Path:
    return clones.copy(clone, tmp_path / "copy")
