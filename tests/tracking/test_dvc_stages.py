"""Which stages are out of date, and dvc.lock while DVC writes it."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from spo.tracking import dvc_lock, dvc_stages

DAG = """\
stages:
  one: {cmd: cp params.yaml one.txt, params: [seed], outs: [one.txt]}
  two: {cmd: cp one.txt two.txt, deps: [one.txt], outs: [two.txt]}
  other: {cmd: cp params.yaml other.txt, params: [seed], outs: [other.txt]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "dvc.yaml").write_text(DAG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_changed_and_what_follows_it_is_out_of_date(project: Path) -> None:
    from dvc.repo import Repo

    every = {"one": (), "two": ("one",), "other": ()}
    assert dvc_stages.needs() == every == dvc_stages.out_of_date()
    assert list(dvc_stages.needs()).index("one") < list(dvc_stages.needs()).index("two")
    with Repo() as repository:
        repository.reproduce()
    assert dvc_stages.out_of_date() == {}
    (project / "one.txt").unlink()
    assert dvc_stages.out_of_date() == {"one": (), "two": ("one",)}
    (project / "two.txt").unlink()
    (project / "one.txt").write_text("seed: 0\n")
    assert dvc_stages.out_of_date() == {"two": ("one",)}


def test_a_dag_that_dvc_refuses_is_one_line(project: Path) -> None:
    (project / "dvc.yaml").write_text(DAG.replace("two.txt]", "one.txt]"))
    with pytest.raises(ValueError, match=r"^dvc: .*one") as refused:
        dvc_stages.out_of_date()
    assert "\n" not in str(refused.value)


def test_dvc_lock_is_read_when_dvc_has_written_it(project: Path) -> None:
    """DVC empties the file and writes it again, under its lock."""
    (project / ".dvc/tmp").mkdir(exist_ok=True)
    (project / "dvc.lock").write_text("")
    with dvc_lock.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read: list[dict[str, dvc_lock.Entry]] = []
        reader = threading.Thread(target=lambda: read.append(dvc_lock.read()))
        reader.start()
        reader.join(0.2)
        assert reader.is_alive(), "it waits"
        (project / "dvc.lock").write_text("stages: {one: {cmd: cp params.yaml one.txt}}\n")
        fcntl.flock(lock, fcntl.LOCK_UN)
        reader.join(60)
    assert list(read[0]) == ["one"]
