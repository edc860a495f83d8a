"""Ctrl-C and SIGTERM in processes of their own, and the order of the limits."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spo.runtime import signals


def test_every_limit_is_longer_than_what_must_be_over_before_it() -> None:
    assert signals.STOPPED_DELIVERY <= min(signals.DELIVERY.values())
    assert signals.REPEAT + signals.STOPPED_DELIVERY < signals.CTRL_C
    saved = signals.SAVE + signals.STOPPED_DELIVERY
    assert saved < signals.LAUNCHER_KILL < signals.WATCHDOG_KILL < signals.FLOW_KILL
    assert signals.WATCHDOG_KILL - signals.LAUNCHER_KILL > signals.WATCHDOG_POLL
    assert signals.FLOW_KILL < signals.COLLECTIVE.total_seconds()


PROGRAM = """
import sys, time
from spo import cli
from spo.commands import arguments
from spo.runtime import signals
sys.argv = ["spo", "prompts"]
signals.CTRL_C = {limit}
class Slow:
    def __del__(self):
        print("ready", flush=True)
        {finaliser}
def work(args):
    try:
        Slow()
        print("on", flush=True)
        time.sleep(900)
    except KeyboardInterrupt:
        {answer}
arguments._run_stage = work
sys.exit(cli.main())
"""


def interrupted(limit: int, finaliser: str, answer: str) -> tuple[int, str]:
    """Return how the program ended after one Ctrl-C in its finaliser, and what it printed of it."""
    code = PROGRAM.format(limit=limit, finaliser=finaliser, answer=answer)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        return process.wait(timeout=300), process.stderr.read().strip()


def test_a_ctrl_c_that_python_drops_comes_again() -> None:
    """Python drops an exception in a finaliser, and prints that it did."""
    assert interrupted(40, "time.sleep(0.5)", "raise") == (130, "spo: stopped")


def test_a_stage_that_hangs_after_a_ctrl_c_is_ended_by_the_kernel() -> None:
    assert interrupted(1, "time.sleep(0.1)", "time.sleep(900)")[0] == -signal.SIGALRM


def test_another_exception_that_python_drops_is_printed() -> None:
    code = (
        "class A:\n    def __del__(self): 1 / 0\nfrom spo.runtime import signals\nsignals.arm_ctrl_c()\nA()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "ZeroDivisionError" in done.stderr and done.returncode == 0


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)


def test_a_second_ctrl_c_stops_at_once_but_not_a_second_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's SIGTERM ends `dvc repro` too, whose absence is another SIGTERM by the watchdog."""
    monkeypatch.delenv(signals.LAUNCHED, raising=False)
    with signals.stop_on_signal() as stopped:
        send(signal.SIGTERM, signal.SIGTERM)
    assert stopped == [signal.SIGTERM, signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt, match="at once"), signals.stop_on_signal():
        send(signal.SIGINT, signal.SIGINT)


def test_what_the_launcher_passes_on_is_no_second_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.LAUNCHED, "1")
    with signals.stop_on_signal() as stopped:
        send(signal.SIGINT, signal.SIGINT)
    assert len(stopped) == 2


FOREGROUND = """
import sys
from spo.runtime.signals import children
child = '''
import os, signal, sys, time
def stop(number, frame):
    time.sleep(1)
    os.write(1, b"saved\\\\n")  # the signal may come while print is still at work, which allows no second one
    sys.exit(3)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"ready\\\\n")
time.sleep(900)
'''
try:
    with children() as started:
        print(started.start([sys.executable, "-c", child]).wait())
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "to_group", "output", "code"),
    [
        (signal.SIGINT, True, ["saved", "3", "interrupted"], 130),
        (signal.SIGTERM, False, ["saved", "3"], 143),
    ],
)
def test_a_command_may_end_in_its_own_time(number: int, to_group: bool, output: list[str], code: int) -> None:
    """subprocess.run would kill it a quarter of a second after the terminal's Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-c", FOREGROUND], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.stdout.read().split() == output
        assert process.wait(timeout=300) == code


EARLY = """
import os, runpy, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "spo.config.training":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
sys.argv = ["spo", "pairs"]
runpy.run_module("spo", run_name="__main__")
"""


def test_a_ctrl_c_while_spo_is_imported_is_one_line() -> None:
    """A Ctrl-C in the first 0.2 s had been answered by a traceback."""
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr, done.stdout) == (130, "spo: stopped\n", "")


def test_outside_the_main_thread_no_handler_is_set() -> None:
    def work() -> tuple[int, list[int]]:
        with signals.stop_on_signal() as stopped, signals.exit_on_sigterm(), signals.children() as started:
            assert signal.getsignal(signal.SIGTERM) == before
            return started.start([sys.executable, "-c", "import sys; sys.exit(3)"]).wait(), stopped

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (3, [])
