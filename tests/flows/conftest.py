"""flows/ is no package: the flow's file as a module, and a small DVC project to run it on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
