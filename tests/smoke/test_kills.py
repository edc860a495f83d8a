"""Whole stages under the real `dvc repro`, killed and started again; the long version is in kills.py."""

import os
import re
import signal
import subprocess
from pathlib import Path

import clones
import kills
import psutil
import pytest
from kills import Kill

STAGES = ["align@spo", "generate@spo", "score@spo"]
pytestmark = pytest.mark.smoke


@pytest.mark.nightly
def test_killed_and_started_again_is_undisturbed_bit_for_bit(clone: Path, copy: Path) -> None:
    clones.forget(copy, STAGES)
    planned = [
        Kill(signal.SIGKILL, "dvc", "after a write"),
        Kill(signal.SIGTERM, "stage", "in a write"),
        Kill(signal.SIGINT, "group", "any time"),
    ]
    outcomes = kills.series(copy, planned, seed=0, spread=2.0)  # the last comes while a fast machine works
    assert [o.kill for o in outcomes] == [*planned, None]
    assert clones.differences(clone, copy) == []


def test_only_what_python_says_before_our_code_runs_is_forgiven() -> None:
    start = "Traceback (most recent call last):\n"
    script = '  File "/clone/.venv/bin/spo", line 4, in <module>\n    from spo.__main__ import entry\n'
    ours = '  File "/clone/src/spo/cli.py", line 9, in <module>\n    import argparse\n'
    frozen = '  File "<frozen importlib._bootstrap>", line 980, in exec_module\n'
    fatal = "Fatal Python error: init_sys_streams: can't initialize\nPython runtime state: core initialized\n"
    end = "KeyboardInterrupt\n"
    for said in (fatal + start + frozen + end, start + script + frozen + end):
        assert kills.PYTHONS_OWN_START.sub("", f"before\n{said}after\n") == "before\nafter\n"
    for said in (start + script + ours + end, start + script + ours + frozen + end, start + frozen + end):
        assert kills.PYTHONS_OWN_START.sub("", said) == said


@pytest.mark.nightly
def test_a_second_run_meanwhile_is_refused_in_one_line(copy: Path) -> None:
    clones.forget(copy, STAGES)
    with kills.repro(copy) as (dvc, _):
        assert kills.until(lambda: bool(kills.checkpoints(copy)), 120)
        stage = kills.stage_of(dvc.pid)
        assert stage is not None
        stage.suspend()
        try:
            by_hand = clones.run(copy, "spo", "align", "spo")
            by_dvc = clones.run(copy, "dvc", "repro")
        finally:
            stage.resume()
        made = copy / "outputs/align/spo/pytorch_lora_weights.safetensors"
        assert kills.until(lambda: made.exists() or dvc.poll() is not None, 300) and made.exists()
    lines = [line for line in by_hand.stderr.splitlines() if line.startswith("spo: ")]
    lines = [line for line in lines if not line.startswith("spo: threads")]
    assert by_hand.returncode == 75 and lines == [
        "spo: stage align-spo already runs in this folder; wait for it or stop it"
    ]
    assert by_dvc.returncode != 0 and "Traceback" not in by_dvc.stderr
    assert re.search(rf"\(PID {dvc.pid}\): \S*dvc repro", by_dvc.stderr) or "already runs" in by_dvc.stderr, (
        by_dvc.stderr
    )


@pytest.mark.nightly
def test_a_stage_whose_dvc_exits_before_it_begins_writes_nothing(copy: Path) -> None:
    clones.forget(copy, STAGES)
    with kills.repro(copy) as (dvc, log):
        assert kills.until(lambda: kills.stage_of(dvc.pid) is not None, 120)
        os.kill(dvc.pid, signal.SIGKILL)
        assert kills.until(lambda: not kills.workers(copy), 60, 0.1)
        assert "has exited" in log.read_text(errors="replace")
    assert not kills.checkpoints(copy) and not (copy / "outputs/align/spo").exists()


@pytest.mark.nightly
def test_processes_end_with_a_launcher_that_is_killed(copy: Path) -> None:
    """No dvc above: two processes started by one `spo`, which goes without a word."""
    params = (copy / "params.yaml").read_text().replace("iterations: 2", "iterations: 500")
    assert "processes: 1\n" in params
    (copy / "params.yaml").write_text(params.replace("processes: 1\n", "processes: 2\n"))
    with (copy.parent / "log").open("wb") as log:
        options = {"env": clones.environment(copy), "stdout": log, "stderr": log}
        launcher = subprocess.Popen(["spo", "align", "spo"], cwd=copy, start_new_session=True, **options)
    try:
        assert kills.until(lambda: bool(kills.checkpoints(copy)), 240)
        children = psutil.Process(launcher.pid).children(recursive=True)
        assert len(children) >= 2
        launcher.kill()
        assert kills.until(lambda: not any(c.is_running() for c in children), 60, 0.1)
    finally:
        launcher.kill()
        launcher.wait()
    assert "the launcher above" in (copy.parent / "log").read_text(errors="replace")
