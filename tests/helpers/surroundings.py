"""Tests see the same surroundings wherever they run, and leave nothing outside temporary folders.

`make test &`, nohup and CI runners give other signals, variables, permissions and languages than a terminal,
and commands that tests start inherit them.
"""

from __future__ import annotations

import locale
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path.home()  # of the person who runs the tests
# where the libraries would write: in that person's home, and in the repository
WATCHED = (
    *(HOME / name for name in (".prefect", ".mlflow", ".dvc", ".torch", ".clip")),
    *(
        HOME / folder / name
        for folder in (".cache", ".config", ".local/share")
        for name in ("huggingface", "torch", "dvc", "matplotlib", "prefect", "mlflow", "clip", "spo")
    ),
)
TOOLS = ".git .venv __pycache__ .pytest_cache .ruff_cache .mypy_cache .import_linter_cache".split()
MARK = "SPO_TESTS_HOME"  # set for the processes of a parallel run: the first one made it
FOREIGN = tuple("MLFLOW_ PREFECT_ DVC_ HF_ GIT_ XDG_ SLURM_ TORCHELASTIC_ SPO_PARENT LC_".split())
SINGLE = """
RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCH_HOME MPLCONFIGDIR LANGUAGE
MKL_NUM_THREADS OPENBLAS_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME
COLUMNS LINES NO_COLOR FORCE_COLOR CLICOLOR_FORCE
PYTHONDONTWRITEBYTECODE PYTHONUNBUFFERED PYTHONOPTIMIZE PYTHONWARNINGS PYTHONIOENCODING PYTHONUTF8
http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
""".split()
STATE = ("mlflow.db", "mlruns", "mlartifacts", "outputs", ".spo", ".venv")


def neutral() -> None:
    """Make signals, variables, permissions and home those of a fresh account, here and in all children."""
    _default_signals()
    os.umask(0o022)
    sys.dont_write_bytecode = False  # else every run compiles all tests anew: 3 s for each process
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    for name in [n for n in os.environ if n.startswith(FOREIGN) or n in SINGLE]:
        del os.environ[name]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[MARK] = tempfile.mkdtemp(prefix="spo-tests-")
        git = "[user]\n\tname = Tests\n\temail = tests@example.org\n[safe]\n\tdirectory = *\n"
        Path(os.environ[MARK], ".gitconfig").write_text(git, encoding="utf-8")
    else:  # several processes on few cores: one thread each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    home = os.environ[MARK]
    os.environ |= {
        "HOME": home,
        "LANG": "C.UTF-8",
        "DVC_SITE_CACHE_DIR": f"{home}/dvc",  # else /var/tmp/dvc, which may be another user's
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis",
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _default_signals() -> None:
    """Ignored and blocked signals are inherited by commands; those with a handler are not.

    A background job ignores SIGINT, nohup SIGHUP; Python ignores SIGPIPE and puts it back in its children.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGCHLD,
        signal.SIGALRM,
        signal.SIGUSR1,
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(
            signal.SIGHUP, lambda *_: None
        )  # this process outlives the terminal, as it was asked to


def linked(folder: Path) -> Path:
    """Fill a folder with links to what lies in the repository, but not to what runs leave there."""
    for path in ROOT.iterdir():
        if not path.name.startswith(STATE):
            (folder / path.name).symlink_to(path)
    return folder


def traces() -> dict[str, tuple[int, int]]:
    """Return time and size of each file in the repository and in the watched folders of the home.

    Not of code and pages, which somebody may edit meanwhile.
    """
    return {
        str(path): (found.st_mtime_ns, found.st_size)
        for folder in (ROOT, *WATCHED)
        for path in _files(folder)
        if (found := path.lstat())
    }


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in TOOLS and not name.endswith(".egg-info")]
        yield from (Path(parent, name) for name in files if not name.endswith((".py", ".md")))


def left(before: dict[str, tuple[int, int]]) -> list[str]:
    """Return the files that are new, other or gone since `before`."""
    now = traces()
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def forget() -> None:
    """Remove the temporary home."""
    shutil.rmtree(os.environ[MARK], ignore_errors=True)
