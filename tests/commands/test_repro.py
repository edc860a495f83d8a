"""`spo repro` with the real DVC on a small DAG: stages in parallel, failures, Ctrl-C, nothing to do."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_fork
import pytest
import yaml

from spo import config
from spo.commands import forecast, parallel

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
def project(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`left` and `right` each wait for the other to begin: one after the other neither would end."""
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
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
    """In a fork of this process, which imports the large libraries once."""
    for name in ("dvc.repo", "mlflow"):
        importlib.import_module(name)
    _, variables = command()
    return in_fork.spo(Path.cwd(), "repro", *arguments, variables=variables)


def locked_stages(project: Path) -> set[str]:
    return set(yaml.safe_load((project / "dvc.lock").read_text())["stages"])


@pytest.mark.smoke
def test_independent_stages_run_in_parallel_and_after_a_failure_a_second_run_completes_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again when all is done, it records the stages that it skips."""
    monkeypatch.setattr(forecast, "rate", lambda: 10.0)  # a second of matrix products, each time
    both = WAIT.format(me="left", other="right") + "echo threads $OMP_NUM_THREADS\n"
    (project / "left.sh").write_text(both + "echo 'spo: no such file'; exit 2\n")
    done = repro("--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    plan = done.stdout.splitlines()[:3]
    assert plan[0].startswith("smoke: 4 stages to run, ") and plan[1] == "  run: first, left, right, last"
    assert plan[2].startswith("2 at a time (--jobs); what stages print: .spo/logs/")
    (line,) = [line for line in done.stderr.splitlines() if "failed" in line]
    assert line == "spo: failed: left (for the reason in its lines above); not run: last"
    assert "left | spo: no such file" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert locked_stages(project) == {"first", "right"}
    printed = [re.sub("[0-9]+ s", "N s", line.partition(" ")[2]) for line in done.stdout.splitlines()[3:]]
    assert {"first done (N s; 1 of 4)", "left begins", "right begins"} <= {*printed}
    assert any(line.startswith("right done (N s; ") for line in printed), printed
    assert "left failed after N s; .spo/logs/left.log ends with" in printed
    for stage in ("left", "right"):
        threads = max(1, parallel.cores.count() // 2)
        assert f"threads {threads}\n" in (project / f".spo/logs/{stage}.log").read_text()

    (project / "left.sh").write_text(MAKE.format(me="left", other="right"))
    assert repro("--jobs", "2").returncode == 0
    assert (project / "last.txt").read_text() == "left\nright\n"
    assert locked_stages(project) == {"first", "left", "right", "last"}

    again = repro()
    assert (again.returncode, again.stdout) == (0, "Data and pipelines are up to date.\n")
    runs = [json.loads(path.read_text()) for path in (project / ".spo/runs").glob("*/run.json")]
    cached = [run["stage"] for run in runs if run["tags"].get("dvc.cached") == "true"]
    skipped = ["first", "last", "left", "right"], ["first", "right"]  # by the third, by the second
    assert sorted(cached) == sorted(skipped[0] + skipped[1])


@pytest.mark.nightly
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
def test_jobs_that_mean_nothing_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "params.yaml").write_text(config.preset("smoke"))
    (tmp_path / "dvc.yaml").write_text(DAG)
    done = in_fork.spo(tmp_path, "repro", *arguments, variables=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("spo: --jobs ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "one.txt").exists()


WIDE = {str(number): () for number in range(20)}  # stages that need nothing
DIAMOND = {
    "first": (),
    "short": ("first",),
    "long": ("first", "a file"),
    "next": ("long",),
    "last": ("short", "next"),
}


def scheduled(
    jobs: int, work: Callable[[str], bool], is_stopped: Callable[[], bool] = lambda: False
) -> tuple[list[str], list[str], list[tuple[str, int]]]:
    """What failed, what was not started, and each stage with its share, in the order of the starts."""
    started: list[tuple[str, int]] = []
    with ThreadPoolExecutor() as pool:

        def start(stage: str, share: int) -> Future[bool]:
            started.append((stage, share))
            return pool.submit(work, stage)

        failed, left = parallel.schedule(DIAMOND, jobs, start, lambda f: f.result(), is_stopped)
    return failed, left, started


def test_one_at_a_time_the_longest_chain_goes_first() -> None:
    failed, left, started = scheduled(1, lambda stage: True)
    assert [stage for stage, _ in started] == ["first", "long", "short", "next", "last"]
    assert {share for _, share in started} == {1} and failed == left == []


def test_independent_stages_run_in_parallel() -> None:
    """`short` and `long` wait for each other: one after the other they would not end."""
    both = threading.Barrier(2)

    def work(stage: str) -> bool:
        if stage in ("short", "long"):
            both.wait(timeout=300)
        return True

    failed, left, started = scheduled(3, work)
    assert failed == left == [] and sorted(stage for stage, _ in started) == sorted(DIAMOND)
    assert started[:3] == [("first", 1), ("long", 2), ("short", 2)]
    assert started[-1] == ("last", 1)


def test_after_a_failure_those_that_run_end_and_none_starts() -> None:
    has_failed, ended = threading.Event(), []

    def work(stage: str) -> bool:
        if stage == "long":
            has_failed.set()
            return False
        if stage == "short":
            assert has_failed.wait(timeout=300)
        ended.append(stage)
        return True

    failed, left, _ = scheduled(2, work)
    assert (ended, failed, sorted(left)) == (["first", "short"], ["long"], ["last", "next"])


def test_after_a_stop_none_starts() -> None:
    stopped = threading.Event()

    def work(stage: str) -> bool:
        stopped.set()
        return True

    failed, left, started = scheduled(2, work, stopped.is_set)
    assert started == [("first", 1)] and failed == []
    assert sorted(left) == ["last", "long", "next", "short"]


def test_on_a_gpu_one_stage_runs_at_a_time_without_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.cores, "count", lambda: 8)
    monkeypatch.setattr(parallel, "accelerator", lambda: "cuda")
    number, why = parallel.jobs_for(None, 1, WIDE)
    assert number == 1 and "share the cuda" in why
    assert parallel.jobs_for(3, 1, WIDE) == (3, "--jobs")
    monkeypatch.setattr(parallel, "accelerator", lambda: None)
    assert [parallel.jobs_for(None, processes, WIDE)[0] for processes in (1, 2, 3, 9)] == [8, 4, 2, 1]


# seconds in one thread of the default experiment's longest stages (docs/results.md)
DEFAULT = {
    "pairs": ((), 20.0),
    "preference": (("pairs",), 180.0),
    "preference_latent": (("pairs",), 200.0),
    "align@diffusion_dpo": (("pairs",), 350.0),
    "align@spo": (("preference",), 380.0),
    "align@lpo": (("preference_latent",), 130.0),
    "generate": (("align@spo", "align@lpo", "align@diffusion_dpo"), 40.0),
}


def makespan(monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int) -> float:
    """The seconds of DEFAULT by a clock of its own; threads are as fast as `speedup` says."""
    monkeypatch.setattr(parallel.cores, "count", lambda: cores)
    now, ends = 0.0, {}

    def start(stage: str, share: int) -> Future[Any]:
        threads = parallel.threads_for(share, 1)
        future: Future[Any] = Future()
        ends[future] = now + DEFAULT[stage][1] / forecast.speedup(threads)
        return future

    def wait(running: Any, **_: Any) -> Any:
        nonlocal now
        first = min(running, key=ends.__getitem__)
        now = ends[first]
        return SimpleNamespace(done={first})

    monkeypatch.setattr(parallel, "wait", wait)
    needs, work = ({stage: own[i] for stage, own in DEFAULT.items()} for i in (0, 1))
    assert parallel.schedule(needs, jobs, start, lambda future: True, work=work) == ([], [])
    return now


def test_by_seconds_the_chain_that_takes_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two cores: the pairs alone in two threads; preference model and SPO (560 s) beside Diffusion-DPO,
    the latent model and LPO (680 s); the images alone."""
    longest = 20 + 180 + 380 + 40
    needs, work = ({stage: own[i] for stage, own in DEFAULT.items()} for i in (0, 1))
    assert parallel.longest(needs, work) == longest and parallel.longest(needs) == 4
    total = sum(work.values())
    assert makespan(monkeypatch, 1, 1) == total == 1300
    assert makespan(monkeypatch, 2, 2) == pytest.approx((20 + 40) / 2**0.5 + 350 + 200 + 130)


def test_more_cores_than_the_longest_chain_keeps_busy_become_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    needs, work = ({stage: own[i] for stage, own in DEFAULT.items()} for i in (0, 1))
    monkeypatch.setattr(parallel, "accelerator", lambda: None)
    taken = {}
    for cores in (2, 4, 8):
        monkeypatch.setattr(parallel.cores, "count", lambda cores=cores: cores)
        number, _ = parallel.jobs_for(None, 1, needs, work)
        assert number == 2, "1,300 s of work, 620 of them one after the other"
        taken[cores] = makespan(monkeypatch, cores, number)
    assert taken[4] == pytest.approx(taken[2] / 2**0.5) and taken[8] == pytest.approx(taken[2] / 2)
    assert taken[8] < makespan(monkeypatch, 8, 8), (
        "a stage for each core leaves the longest chain in one thread"
    )
