"""The name of resume state changes with what it is made from, and with nothing else."""

from pathlib import Path

import pytest

from spo.runtime import fingerprint as module
from spo.runtime.fingerprint import fingerprint


def test_only_modules_and_visible_inputs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    for name in ("code/a.py", "code/deep/b.py", "inputs/c.txt", ".cache/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    inputs = [tmp_path / "inputs", tmp_path / ".cache/d.txt"]

    def made() -> str:
        return fingerprint(["a"], inputs, ["code"])

    before = made()
    for name in (
        "code/__pycache__/a.cpython-311.pyc",
        "code/a.py~",
        "code/.a.py.swp",
        "code/.ipynb_checkpoints/a.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("left")
    for name in ("inputs/.c.txt.0123.partial", "inputs/.DS_Store", "inputs/.nfs/0001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("left")
    assert made() == before
    for name in ("code/deep/b.py", "inputs/c.txt", ".cache/d.txt"):
        (tmp_path / name).write_text("second")
        assert made() != before
        (tmp_path / name).write_text("first")
    assert made() == before
