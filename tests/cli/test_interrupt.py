"""Ctrl-C in a process of its own: at a moment when Python would lose it, and where nothing listens."""

import signal
import subprocess
import sys

import pytest

from spo.runtime import interrupt

PROGRAM = """
import sys, time
from spo import cli
from spo.runtime import interrupt
sys.argv = ["spo", "pairs"]
interrupt.PATIENCE = {patience}
class Slow:
    def __del__(self):
        print("ready", flush=True)
        {finaliser}
def work():
    Slow()
    try:
        print("on", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        {answer}
cli.main = work
sys.exit(cli.entry())
"""


def run(patience: int, finaliser: str, answer: str) -> tuple[int, str]:
    """How the program ended after one Ctrl-C in its finaliser, and what it said of it."""
    code = PROGRAM.format(patience=patience, finaliser=finaliser, answer=answer)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        return process.wait(timeout=30), process.stderr.read()


def test_a_ctrl_c_within_a_finaliser_comes_after_it() -> None:
    """Python drops an exception there, and prints that it did."""
    assert run(20, "time.sleep(0.5)", "return 130") == (130, "")


@pytest.mark.parametrize(
    ("finaliser", "answer"),
    [
        ("while True: time.sleep(0.1)", "return 130"),  # it never comes
        ("time.sleep(0.1)", "time.sleep(60)"),  # it comes, and nothing ends
    ],
)
def test_a_ctrl_c_that_is_lost_ends_the_process_all_the_same(finaliser: str, answer: str) -> None:
    assert run(1, finaliser, answer)[0] == -signal.SIGALRM


def test_the_import_system_is_not_broken_off() -> None:
    seen = {}
    told = "import sys\nframe = sys._getframe()"
    for name in ("<frozen importlib._bootstrap>", "/lib/weakref.py", "somewhere.py"):
        names: dict = {}
        exec(compile(told, name, "exec"), names)
        seen[name] = interrupt.deaf(names["frame"])
    assert seen == {"<frozen importlib._bootstrap>": True, "/lib/weakref.py": True, "somewhere.py": False}


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
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, "spo: stopped\n", "")
