"""Several processes by torch's own launcher, and a stage that ends with what started it.

The launched processes are stand-ins for `python -m spo`, which import nothing.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from spo.runtime import processes
from spo.runtime.messages import LostProcessError, TransientError

LOST = 75  # what a process ends with whose connection to another broke: it leaves no line
STAND_IN = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def fail(message, code):
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": message, "code": code, "timestamp": str(int(time.time()))}, file)
    sys.exit(code)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """stand_in(code): what `python -m spo` does in each process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> Path:
        (tmp_path / "spo").mkdir()
        (tmp_path / "spo/__init__.py").touch()
        (tmp_path / "spo/__main__.py").write_text(STAND_IN + code)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "stuck", ["", pytest.param("signal.signal(signal.SIGTERM, signal.SIG_IGN)", marks=pytest.mark.nightly)]
)
def test_a_killed_process_ends_all_within_a_minute(
    stand_in, stuck: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that waits for it in NCCL's kernel, where it handles no SIGTERM: 30 s later."""
    stand_in(f"{stuck}\ntime.sleep(0 if rank else 900)\nos.kill(os.getpid(), signal.SIGKILL)")
    began = time.monotonic()
    with pytest.raises(ValueError, match="process 1 of 2 ended with -9") as error:
        processes.launch(["align", "spo"], 2)
    assert time.monotonic() - began < 60 and not isinstance(error.value, TransientError)
    assert capfd.readouterr().err.strip() == ""


@pytest.mark.parametrize(("code", "kind"), [(2, ValueError), (75, TransientError)])
def test_the_line_of_one_process_is_raised_once(stand_in, capfd, code: int, kind: type) -> None:
    stand_in(f"fail('outputs/x: truncated', {code}) if rank else time.sleep(900)")
    with pytest.raises(kind, match="^outputs/x: truncated$") as error:
        processes.launch(["align", "spo"], 2)
    assert type(error.value) is kind and capfd.readouterr().err.strip() == ""


STOPPED = """
folder = os.environ["PYTHONPATH"]
def stop(number, frame):
    open(f"{folder}/saved-{rank}", "w")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/ready-{rank}", "w")
while rank == 0 and not os.path.exists(f"{folder}/ready-1"):
    time.sleep(0.01)
if rank == 0:
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(900)
"""


def test_a_stop_of_the_launcher_lets_its_processes_save(stand_in) -> None:
    folder = stand_in(STOPPED)
    with pytest.raises(KeyboardInterrupt, match="run it again to resume"):
        processes.launch(["align", "spo"], 2)
    assert sorted(p.name for p in folder.glob("saved-*")) == ["saved-0", "saved-1"]


def failure(folder: Path, rank: int, exitcode: int, said: str | None = None) -> ProcessFailure:
    file = folder / f"error-{rank}"
    if said is not None:
        file.write_text(f'{{"message": "{said}", "code": 2, "timestamp": "9999999999"}}')
    return ProcessFailure(rank, rank, exitcode, str(file))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(LOST, None), (2, "data/x: truncated")], "data/x: truncated"),
        ([(LOST, None), (-9, None)], "process 1 of 2 ended with -9"),
        ([(LOST, None)], "process 0 of 2 ended with 75"),
    ],
)
def test_a_process_that_lost_another_is_not_the_reason(
    ends, expected: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """On a line of its own: a progress bar may have left its line open."""

    def started(*_: object) -> None:
        print("\rloading:  40%", end="", file=sys.stderr)
        failures = {rank: failure(tmp_path, rank, *end) for rank, end in enumerate(ends)}
        raise ChildFailedError("spo", failures)

    monkeypatch.setattr(api, "elastic_launch", lambda *_: started)
    with pytest.raises(ValueError, match=expected):
        processes.launch(["align", "spo"], 2)
    assert capsys.readouterr().err.endswith("40%\n")
    assert issubclass(LostProcessError, TransientError)


DVC = """
import subprocess, sys
subprocess.run(["sh", "-c", sys.argv[2] + "; true"])  # a shell, which lives on, between DVC and its stage
"""
STAGE = """
import os, sys, time
from spo.runtime.processes import dvc_above, tied_to_starter
print(dvc_above().pid, flush=True)
with tied_to_starter():
    while True:
        with open(sys.argv[1], "a") as file:
            file.write("x")
        time.sleep(0.05)
"""


def until(condition, seconds: float = 300.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_the_dvc_that_started_it(tmp_path: Path, number: int) -> None:
    """A process that looks like `dvc repro`, a shell and a stage under it."""
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(STAGE)
    command = f"{sys.executable} {tmp_path / 'stage.py'} {tmp_path / 'out'}"
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "dvc"), "repro", command], stdout=subprocess.PIPE, text=True
    ) as dvc:
        assert dvc.stdout is not None and dvc.stdout.readline() == f"{dvc.pid}\n"
        assert until((tmp_path / "out").exists)
        stage = next(
            p for p in psutil.Process(dvc.pid).children(recursive=True) if "stage.py" in str(p.cmdline()[1:2])
        )
        dvc.send_signal(number)
        assert until(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE)
        size = (tmp_path / "out").stat().st_size
        time.sleep(0.2)
        assert (tmp_path / "out").stat().st_size == size


def test_a_stage_whose_dvc_has_exited_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processes.DVC_STAGE, "align@spo")
    monkeypatch.setattr(processes, "dvc_above", lambda: None)
    with pytest.raises(ValueError, match="has exited: stopped before it wrote"), processes.tied_to_starter():
        raise AssertionError("it has begun")


@pytest.mark.parametrize(
    ("command", "is_dvc"),
    [
        (["/venv/bin/python", "/venv/bin/dvc", "repro", "--force"], True),
        (["python", "-m", "dvc", "exp", "run"], True),
        (["python", "/lib/dvc/__main__.py", "exp", "exec-run"], True),
        (["timeout", "60", "dvc", "-v", "repro"], True),
        (["dvc", "push"], False),
        (["bash", "-c", "dvc repro"], False),
        (["vim", "repro", "dvc"], False),
        (["sh"], False),
    ],
)
def test_what_counts_as_a_repro(command: list[str], is_dvc: bool) -> None:
    assert processes.is_dvc(command) == is_dvc
