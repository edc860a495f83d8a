"""`spo repro` with the real DVC on a small DAG: stages at the same time, failures, Ctrl-C, nothing to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from spo import config
from spo.commands import repro as repro_command
from spo.commands import stages_at_once

DAG = """\
stages:
  first: {cmd: echo one > one.txt, params: [seed], outs: [one.txt]}
  left: {cmd: sh left.sh, deps: [one.txt], outs: [left.txt]}
  right: {cmd: sh right.sh, deps: [one.txt], outs: [right.txt]}
  last: {cmd: cat left.txt right.txt > last.txt, deps: [left.txt, right.txt], outs: [last.txt]}
"""
WAIT = "touch {me}.began; until [ -e {other}.began ]; do sleep 0.1; done\n"
MAKE = WAIT + "echo threads $OMP_NUM_THREADS; echo {me} > {me}.txt\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`left` and `right` each wait for the other to begin: in turn neither would end."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (tmp_path / "params.yaml").write_text(config.preset("smoke"))
    (tmp_path / "dvc.yaml").write_text(DAG)
    (tmp_path / "left.sh").write_text(MAKE.format(me="left", other="right"))
    (tmp_path / "right.sh").write_text(MAKE.format(me="right", other="left"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> tuple[list[str], Mapping[str, str]]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PATH": path}
    return [sys.executable, "-m", "spo", "repro", *arguments], variables


def repro(*arguments: str) -> subprocess.CompletedProcess[str]:
    words, variables = command(*arguments)
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=1200)


@pytest.mark.smoke
def test_independent_stages_run_at_the_same_time_and_then_nothing_is_left(project: Path) -> None:
    done = repro("--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "last.txt").read_text() == "left\nright\n"
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {
        "first",
        "left",
        "right",
        "last",
    }
    printed = done.stdout.splitlines()
    assert all(line.split(" | ")[0].strip() in ("first", "left", "right", "last") for line in printed), (
        printed
    )
    threads = max(1, stages_at_once.cores.count() // 2)
    assert {f"left  | threads {threads}", f"right | threads {threads}"} <= set(printed)
    assert "spo: 4 stages, up to 2 at a time" in done.stderr
    again = repro()
    assert (again.returncode, again.stdout) == (0, "Data and pipelines are up to date.\n")
    runs = [json.loads(path.read_text()) for path in (project / ".spo/runs").glob("*/run.json")]
    cached = [run["stage"] for run in runs if "origin" in run]
    assert sorted(cached) == ["first", "last", "left", "right"], "of the second"


@pytest.mark.smoke
def test_after_a_failure_the_stage_beside_it_ends_and_its_work_is_kept(project: Path) -> None:
    (project / "left.sh").write_text("touch left.began; echo 'spo: no such file'; exit 2\n")
    done = repro("--jobs", "2")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "failed" in line]
    assert line == "spo: failed: left (for the reason in its lines above); not run: last"
    assert "left  | spo: no such file" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {"first", "right"}
    (project / "left.sh").write_text(MAKE.format(me="left", other="right"))
    assert repro("--jobs", "2").returncode == 0
    assert (project / "last.txt").exists()


@pytest.mark.smoke
def test_ctrl_c_waits_until_every_stage_has_saved(project: Path) -> None:
    for me in ("left", "right"):
        other = {"left": "right", "right": "left"}[me]
        save = f"trap 'sleep 0.5; echo saved > {me}.saved; exit 130' INT\n"
        (project / f"{me}.sh").write_text(
            save + WAIT.format(me=me, other=other) + "while :; do sleep 0.1; done\n"
        )
    words, variables = command("--jobs", "2")
    with subprocess.Popen(
        words,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        end = time.monotonic() + 1200
        while not all((project / f"{me}.began").exists() for me in ("left", "right")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)  # DVC ignores Ctrl-C only a moment after it has started a command
        os.killpg(process.pid, signal.SIGINT)
        _, output = process.communicate(timeout=1200)
    assert process.returncode == 130, output
    assert (project / "left.saved").exists() and (project / "right.saved").exists()
    assert not (project / "last.txt").exists() and "Traceback" not in output


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("--jobs", "2", "first")])
def test_jobs_that_mean_nothing_are_refused(project: Path, arguments: tuple[str, ...]) -> None:
    done = repro(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("spo: --jobs ") and done.stderr.count("\n") == 1
    assert not (project / "one.txt").exists()


def test_two_stages_that_load_models_are_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one process, which is given what tqdm and OpenMP read when they are imported."""

    @contextmanager
    def ready(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
        yield {"SPO_FORKS": f"{environment['TQDM_MININTERVAL']} s, {environment['OMP_WAIT_POLICY']}"}

    monkeypatch.setattr(repro_command.forks, "ready", ready)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(stages_at_once, "accelerator", lambda: None)
    both = {"align@spo": ["preference"], "generate@spo": ["align@spo"], "report": ["generate@spo"]}
    with repro_command._forks(both, stages_at_once.OUTPUT) as variables:
        assert variables == {"SPO_FORKS": "5 s, ACTIVE"}
    one = {"generate@spo": (), "report": ["generate@spo"]}
    with repro_command._forks(one, stages_at_once.OUTPUT) as variables:
        assert variables == {}, "one imports as fast by itself"
    monkeypatch.setattr(stages_at_once, "accelerator", lambda: "cuda")
    with repro_command._forks(both, stages_at_once.OUTPUT) as variables:
        assert variables == {}


def test_on_a_gpu_stages_run_in_turn_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_at_once.cores, "count", lambda: 8)
    monkeypatch.setattr(stages_at_once, "accelerator", lambda: "cuda")
    assert stages_at_once.at_once(None, 1)[0] == 1 and "share the cuda" in stages_at_once.at_once(None, 1)[1]
    assert stages_at_once.at_once(3, 1) == (3, "--jobs")
    monkeypatch.setattr(stages_at_once, "accelerator", lambda: None)
    assert [stages_at_once.at_once(None, processes)[0] for processes in (1, 2, 3, 9)] == [8, 4, 2, 1]
