"""Forks that run stages: what they are given, signals, how they end, and what ends when a process is killed.

The forks run a stand-in for the package that shows what it sees; the libraries they have are the real ones.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

from spo.runtime import ancestors, forks

Process: TypeAlias = "subprocess.Popen[str]"
Start: TypeAlias = Callable[..., Process]
SHOW = """
import atexit, json, os, sys
import spo
spo.__path__.append(spo.REAL)
from spo.runtime import ancestors, cores, forks
large = [name for name in ("torch", "diffusers", "transformers", "peft") if name in sys.modules]
threads = cores.set_threads(os.environ)
import torch
atexit.register(print, "the end")
print(json.dumps({
    "arguments": sys.argv[1:], "folder": os.getcwd(), "variable": os.environ.get("GIVEN"), "large": large,
    "input": sys.stdin.read(), "threads": torch.get_num_threads(), "above": ancestors.above()[0].pid,
    "customised": "sitecustomize" in sys.modules, "asks_again": forks.ask() is not None,
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""
WAIT = """
import os, signal, sys, time
got = []
def note(number, frame):
    got.append(number)
    os.write(1, b"got\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print(os.getpid(), flush=True)
while len(got) < 2:
    time.sleep(0.02)
sys.exit(int(sum(got)))
"""
ASK = f"""
import runpy, sys
status = runpy.run_path({forks.__file__!r})["ask"]()
sys.exit(99 if status is None else status)
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package `spo` whose command is the code in the variable PROGRAM."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "spo").mkdir()
    real = str(Path(forks.__file__).parents[1])
    (folder / "spo/__init__.py").write_text(f"REAL = {real!r}\n")
    (folder / "spo/__main__.py").write_text("import os\nexec(os.environ['PROGRAM'])\n")
    (folder / "sitecustomize.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def variable() -> Iterator[dict[str, str]]:
    with forks.ready() as given:
        yield given


@pytest.fixture
def start_in(stand_in: Path) -> Start:
    def start(variable: dict[str, str], program: str, *arguments: str, **options: Any) -> Process:
        given = {"PYTHONPATH": str(stand_in), "PROGRAM": program, "OMP_NUM_THREADS": "3", "GIVEN": "this"}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        words = [sys.executable, "-c", ASK, *arguments]
        return subprocess.Popen(words, env=os.environ | variable | given, text=True, **pipes, **options)

    return start


@pytest.fixture
def start(start_in: Start, variable: dict[str, str]) -> Start:
    return functools.partial(start_in, variable)


def gone(pid: int) -> bool:
    return within(300, lambda: not runs(pid))


def runs(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, does not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def test_a_fork_has_what_the_command_was_given_and_the_libraries(start: Start, tmp_path: Path) -> None:
    process = start(SHOW, "align", "spo", cwd=tmp_path)
    output, errors = process.communicate("typed", timeout=300)
    assert process.returncode == 7 and errors == "to stderr\n"
    shown, end = output.splitlines()
    assert end == "the end", "what is registered for the end runs"
    assert json.loads(shown) == {
        "arguments": ["align", "spo"],
        "folder": str(tmp_path),
        "variable": "this",
        "large": ["torch", "diffusers", "transformers", "peft"],
        "input": "typed",
        "threads": 3,
        "above": os.getpid(),
        "customised": True,
        "asks_again": False,
    }


def test_signals_are_passed_on_as_often_as_they_come(start: Start) -> None:
    process = start(WAIT)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == signal.SIGINT + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_a_fork_the_time_to_save(start: Start, number: int) -> None:
    process = start(WAIT)
    fork = psutil.Process(int(process.stdout.readline()))
    fork.parent().send_signal(number)
    fork.send_signal(number)
    process.stdout.readline()  # two equal signals that wait would be one
    time.sleep(0.2)
    assert fork.is_running() and process.poll() is None
    process.send_signal(number)
    assert process.wait(300) == 2 * number


def test_a_killed_command_takes_its_fork_along_and_no_other(start: Start) -> None:
    killed, other = start(WAIT), start(WAIT)
    pids = [int(process.stdout.readline()) for process in (killed, other)]
    killed.kill()
    assert gone(pids[0]) and psutil.pid_exists(pids[1])
    for number in (signal.SIGINT, signal.SIGINT):
        other.send_signal(number)
        other.stdout.readline()
    assert other.wait(300) == 2 * signal.SIGINT


def test_a_killed_fork_ends_the_command_as_a_shell_would_say_it(start: Start) -> None:
    process = start(WAIT)
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert process.wait(300) == 128 + signal.SIGKILL


def test_who_goes_away_before_asking_disturbs_nobody(start: Start, variable: dict[str, str]) -> None:
    for sent in (b"", b"\n", b"\n{"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(variable[forks.SOCKET])
            connection.sendall(sent)
    assert start("import sys; sys.exit(5)").wait(300) == 5


def test_without_the_process_a_command_runs_by_itself() -> None:
    with forks.ready(large={"no_such_library": ()}) as variable:
        environment = os.environ | variable
        asked = subprocess.run([sys.executable, "-c", ASK], env=environment, timeout=300)
        assert asked.returncode == 99, "the process ended while it imported"
    asked = subprocess.run([sys.executable, "-c", ASK], env=environment, timeout=300)
    assert asked.returncode == 99, "there is no socket any more"
    assert runpy.run_path(forks.__file__)["ask"]() is None, "no variable"


def test_a_signal_is_not_lost_when_the_process_ends_before_it_forks() -> None:
    with socket.socket(socket.AF_UNIX) as listening, tempfile.TemporaryDirectory() as folder:
        listening.bind(f"{folder}/forks")
        listening.listen()
        environment = os.environ | {forks.SOCKET: f"{folder}/forks"}
        with subprocess.Popen(
            [sys.executable, "-c", ASK], env=environment, stderr=subprocess.PIPE
        ) as process:
            connection = listening.accept()[0]
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert process.poll() is None, "it waits for an answer"
            connection.close()
            assert process.wait(300) != 99 and b"KeyboardInterrupt" in process.stderr.read()


def test_a_signal_before_the_fork_can_handle_it_stops_it(start: Start, variable: dict[str, str]) -> None:
    """Here while the process that forks is busy: the command has its answer to wait for."""
    first = start(WAIT)
    server = psutil.Process(int(first.stdout.readline())).parent()
    first.kill()
    server.suspend()
    try:
        process = start("import time; time.sleep(900)")
        assert within(300, lambda: handles(process.pid, signal.SIGTERM)), "it is set last"
        process.send_signal(signal.SIGINT)
    finally:
        server.resume()
    assert process.wait(300) == 130 and process.stderr.read() == "spo: stopped\n"


def test_what_a_fork_starts_stands_below_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of a stage that takes several, which look for the `dvc repro` above."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"]) as command:
        monkeypatch.setenv(forks.ASKED_BY, f"{os.getppid()} {command.pid}")
        found = [process.pid for process in ancestors.above()]
        command.kill()
    assert found[:2] == [os.getppid(), os.getpid()] and forks.asked_by() is None


def test_where_a_socket_cannot_be_made_stages_run_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := tmp_path / ("a" * 120)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with forks.ready(large={}) as variable:
        assert variable == {}


def test_one_of_several_processes_runs_by_itself(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert start("").wait(300) == 99


def test_libraries_read_the_environment_of_the_process(start_in: Start) -> None:
    """tqdm reads how often it draws when it is imported."""
    show = (
        "import inspect, tqdm; print(inspect.signature(tqdm.tqdm.__init__).parameters['mininterval'].default)"
    )
    with forks.ready(os.environ | {"TQDM_MININTERVAL": "7"}, {"tqdm": ()}) as variable:
        assert start_in(variable, show).communicate(timeout=300)[0] == "7.0\n"


def test_when_the_process_is_killed_forks_and_commands_end(start_in: Start) -> None:
    with forks.ready(large={}) as variable, start_in(variable, WAIT) as process:
        fork = int(process.stdout.readline())
        psutil.Process(fork).parent().kill()
        assert gone(fork) and process.wait(300) == 128 + signal.SIGKILL


def test_the_end_waits_for_the_last_fork(start_in: Start) -> None:
    with forks.ready(large={}) as variable:
        process = start_in(variable, "import time; print('begun', flush=True); time.sleep(1)")
        assert process.stdout.readline() == "begun\n"
    assert process.wait(300) == 0
