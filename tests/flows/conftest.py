"""flows/ is no package: the flow's file as a module, a small DVC project for it, and a Prefect server."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import prefect_server
import pytest

FILE = Path(__file__).parents[2] / "flows/pipeline.py"
DAG = """\
stages:
  first:
    cmd: echo hello of first && cp params.yaml one.txt
    params: [seed]
    outs: [one.txt]
  second:
    cmd: sh second.sh
    deps: [one.txt, second.sh]
    outs: [two.txt]
"""


@pytest.fixture(scope="session")
def pipeline() -> ModuleType:
    specification = importlib.util.spec_from_file_location("spo_flow", FILE)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["spo_flow"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def project(pipeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages; the second does what second.sh says."""
    (tmp_path / ".dvc").mkdir()  # what `dvc init --no-scm` makes
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (tmp_path / "params.yaml").write_text((FILE.parents[1] / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text(DAG)
    (tmp_path / "second.sh").write_text("env > environment; cp one.txt two.txt\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture(scope="package")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where a real server with a work pool is: one for all files of this folder that use it."""
    with prefect_server.server(tmp_path_factory.mktemp("prefect")) as variables:
        command = ["prefect", "work-pool", "create", "--type", "process", "spo"]
        subprocess.run(command, env=variables, check=True, capture_output=True)
        yield variables
