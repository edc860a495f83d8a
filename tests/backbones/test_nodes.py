"""Two nodes: processes that know of each other as on two machines, on this one; real stages, gloo.

The launcher is torchrun, one a node, or none, as under a scheduler: then the processes are forks of the test.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import kills
import psutil
import pytest
import torch
from group import exit_codes, run_in
from ports import free_port
from small_experiment import pixels, run, write

from spo import cli, config
from spo.runtime.messages import EXIT_FILE, TRANSIENT, TransientError
from spo.stages import align
from spo.stages.common import stage
from spo.tracking import runs
from spo.training import distributed
from spo.training.checkpoint import CheckpointStore
from spo.training.state import _newest

TRAIN = ["align", "diffusion_dpo"]
STAGES = [TRAIN, ["generate", "base"], ["score", "base"]]
ITERATIONS = 8


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("experiment", ["sd"], indirect=True)
def test_a_lost_node_ends_all_and_two_nodes_give_what_one_process_gives(
    experiment, tmp_path, monkeypatch
) -> None:
    """Killed, started again, and compared with one process that nothing happened to."""
    # a small beta: rounding changes the last digits of a loss only
    changed = {"beta": 10, "iterations": ITERATIONS, "checkpoint_every": 2, "validation": None}
    experiment["align"]["diffusion_dpo"] |= changed
    experiment["generate"]["batch_size"] = 1
    write(experiment)
    for name in ("inputs", "prompts", "pairs"):
        run(name)
    two = tmp_path.parent / "two"
    shutil.copytree(tmp_path, two)
    for words in STAGES:
        run(*words)
    monkeypatch.chdir(two)

    kill_a_node(two)
    assert run_in(2, lambda: [cli.main(words) for words in STAGES]) == [[0, 0, 0]] * 2
    assert losses(two) == pytest.approx(losses(tmp_path), rel=1e-5)
    assert len(losses(tmp_path)) == ITERATIONS
    check_evaluation(two, tmp_path)
    with sqlite3.connect("mlflow.db") as database:
        opened = [row for row in database.execute("select name, status from runs") if "-" in row[0]]
    names = ["align-diffusion_dpo", "align-diffusion_dpo", "generate-base", "score-base"]
    assert sorted(opened) == list(zip(names, ["FAILED", *["FINISHED"] * 3], strict=True)), "one run a stage"


def kill_a_node(folder: Path) -> None:
    """Two launchers; the second and its process are killed after the first checkpoint."""
    with launchers(folder) as (first, second):
        assert kills.until(lambda: bool(kills.checkpoints(folder)), 400, 0.02)
        for process in (*psutil.Process(second.pid).children(), second):
            process.send_signal(signal.SIGKILL)
        assert first.wait(1500) != 0
    lines = [line for line in (folder / "node0").read_text().splitlines() if line.startswith("spo: ")]
    assert len(lines) == 1 and lines[0].startswith("spo: the connection to another of the 2 processes broke")
    assert (folder / "code").read_text() == str(TRANSIENT), "torchrun's own is 1, whatever happened"
    assert not (folder / "outputs/align/diffusion_dpo").exists()
    assert max(int(p.stem) for p in kills.checkpoints(folder)) < ITERATIONS


@contextmanager
def launchers(folder: Path) -> Iterator[list[subprocess.Popen]]:
    """torchrun on two nodes, one process each, whose output goes to node0 and node1."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    paths = [str(slow_disk(folder)), *(path for path in sys.path if path)]
    own = os.environ | {EXIT_FILE: str(folder / "code"), "PYTHONPATH": os.pathsep.join(paths)}
    nodes = []
    try:
        for rank in ("0", "1"):
            with (folder / f"node{rank}").open("wb") as log:
                how = {"cwd": folder, "env": own, "stdout": log, "stderr": log, "start_new_session": True}
                nodes.append(subprocess.Popen([*words, rank, "-m", "spo", *TRAIN], **how))
        yield nodes
    finally:
        for node in nodes:
            if node.poll() is None:
                for process in (*psutil.Process(node.pid).children(), node):
                    process.kill()
            node.wait()


def slow_disk(folder: Path) -> Path:
    """A folder for Python's path, with which a checkpoint takes long enough to be killed after it."""
    place = folder / "slow"
    place.mkdir()
    code = "import os, time\nflush = os.fsync\nos.fsync = lambda file: (flush(file), time.sleep(2))[0]\n"
    (place / "sitecustomize.py").write_text(code)
    return place


def losses(folder: Path) -> list[float]:
    """Of all updates, in their order."""
    rows = list(csv.DictReader((folder / "reports/training/diffusion_dpo.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def check_evaluation(ours: Path, theirs: Path) -> None:
    """The same images up to a grey level, the same scores."""
    archives = [(folder / "outputs/images/base/images.zip").read_bytes() for folder in (ours, theirs)]
    for a, b in zip(*(pixels(io.BytesIO(archive)) for archive in archives), strict=True):
        assert (a - b).abs().max() <= 1
    tables = [csv.DictReader((folder / "outputs/scores/base.csv").open()) for folder in (ours, theirs)]
    for a, b in zip(*tables, strict=True):
        for name in ("pickscore", "hps", "aesthetic"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-4, rel=1e-4)


@pytest.fixture
def standing(tmp_path, monkeypatch) -> Path:
    """A folder with params.yaml, and a stage that only waits for the other node."""

    def meet(params, method) -> None:
        with stage("align", params, method):
            if distributed.is_main_process():
                distributed.all_reduce_sum(torch.ones(1))
            else:
                raise ValueError("outputs/x: truncated")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(align, "run", meet)
    monkeypatch.setattr(runs, "stage_run", lambda *_, **__: nullcontext(runs.Run()))  # seconds of MLflow
    Path("params.yaml").write_text(config.preset("smoke"), encoding="utf-8")
    return tmp_path


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return sorted(line for line in error.splitlines() if line.startswith("spo: "))


def test_a_mistake_of_one_node_ends_both_and_its_code_is_the_jobs(standing, monkeypatch, capfd) -> None:
    """A scheduler (srun with --kill-on-bad-exit) ends what hangs elsewhere."""
    monkeypatch.setenv(EXIT_FILE, str(standing / "code"))
    assert exit_codes(2, lambda: cli.main(TRAIN)) == [TRANSIENT, 2]
    one, other = said(capfd)
    assert one == "spo: outputs/x: truncated (process 1)"
    assert other.startswith("spo: the connection to another of the 2 processes broke (")
    assert (standing / "code").read_text() == "2"


def test_a_stage_that_runs_already_is_refused_once_for_all_nodes(standing, capfd) -> None:
    (standing / ".spo/locks").mkdir(parents=True)
    with (standing / ".spo/locks/align-diffusion_dpo").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert exit_codes(2, lambda: cli.main(TRAIN)) == [TRANSIENT] * 2
    assert said(capfd) == [
        "spo: stage align-diffusion_dpo already runs in this folder; wait for it or stop it"
    ]


def caught(function) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_nodes_that_do_not_share_a_folder_are_refused(tmp_path) -> None:
    def body() -> tuple[str, str]:
        place = tmp_path / os.environ["RANK"]
        place.mkdir()
        os.chdir(place)
        return caught(lambda: distributed.check_folder(Path("nodes")))

    one, other = run_in(2, body)
    assert one[1].startswith(f"{tmp_path}/0 of process 0 is not the folder of process 1")
    assert other[0] == "ValueError" and "shared file system" in other[1]


def test_a_checkpoint_that_one_node_does_not_see_is_not_resumed(tmp_path) -> None:
    """A network file system may show an older state of a folder for a while."""

    def body() -> tuple[str, str, str]:
        store = CheckpointStore(tmp_path / os.environ["RANK"])
        store.save(4, {"weights": torch.ones(1)})
        agreed = _newest(store)[0]
        if distributed.is_main_process():
            store.save(6, {"weights": torch.ones(1)})
        return str(agreed), *caught(lambda: _newest(store))

    for agreed, kind, message in run_in(2, body):
        assert agreed == "4" and kind == TransientError.__name__
        assert "not every process can read checkpoint 6" in message
