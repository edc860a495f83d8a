"""Folders that cannot be written: one line that names the place, and what was made before stays."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import clones
import pytest

pytestmark = pytest.mark.smoke


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """By file modes; for root, whom they do not stop, by a mount."""
    if os.geteuid() != 0:
        modes = {p: p.stat().st_mode for p in (folder, *folder.rglob("*"))}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("stage", "folder"),
    [
        (("align", "spo"), "outputs/align"),
        (("report",), "reports"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(copy: Path, stage: tuple[str, ...], folder: str) -> None:
    before = content(copy / folder)
    assert before
    with read_only(copy / folder):
        done = clones.spo(copy, *stage)
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("spo: ") and "threads" not in line
    ]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{folder}/" in line or f"{folder}:" in line or f"'{folder}" in line, line
    assert "Read-only" in line or "Permission" in line
    assert content(copy / folder) == before


def test_state_that_cannot_be_written_is_said(copy: Path) -> None:
    """.spo holds checkpoints and what is to be tracked; dvc stops with the stage."""
    clones.forget(copy, ["align@spo"])
    with read_only(copy / ".spo"):
        done = clones.run(copy, "dvc", "repro", "align@spo")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("spo: ") and "threads" not in line]
    assert len(lines) == 1 and ".spo/" in lines[0] and ("Read-only" in lines[0] or "Permission" in lines[0])
    assert not (copy / "outputs/align/spo").exists()
