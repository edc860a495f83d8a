"""The suite in a background job: default signals for commands, and a run fails that leaves files behind."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
INSIDE = '''
import os, subprocess, sys
from pathlib import Path

SHOW = """
import os, signal
print(*[signal.getsignal(number).name for number in (1, 15, 17)], os.umask(0), os.environ["HOME"])
"""


def test_commands_get_default_signals_and_a_home_of_their_own():
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True).stdout
    assert shown.startswith("SIG_DFL SIG_DFL SIG_DFL 18 ") and "spo-tests-" in shown
    interrupted = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", interrupted], stderr=subprocess.DEVNULL)
    assert done.returncode == -2


def test_a_stage_without_a_folder_reads_the_repository_and_writes_elsewhere():
    assert Path("params.yaml").read_text() == "seed: 0"
    Path("mlflow.db").write_text("a run")


def test_careless():
    Path(__file__).parents[1].joinpath("mlruns").mkdir()
    Path(__file__).parents[1].joinpath("mlruns/careless.txt").write_text("a run")
'''


def as_in_a_background_job() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_in_the_background_commands_have_default_signals_and_what_is_left_fails_the_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "tests/helpers").mkdir(parents=True)
    for name in ("conftest.py", "helpers/surroundings.py"):
        shutil.copy(TESTS / name, tmp_path / "tests" / name)
    (tmp_path / "tests/test_inside.py").write_text(INSIDE)
    (tmp_path / "params.yaml").write_text("seed: 0")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["tests/helpers"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=as_in_a_background_job,
        umask=0o077,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "outside" in line]
    assert found == [f"written outside temporary folders: {tmp_path}/mlruns/careless.txt"]
    assert done.returncode == 1
