"""For all tests: no network, no state of the person who runs them, few threads."""

import gc
import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import surroundings

gc.disable()  # until all is imported: the search for garbage would take a third of that time
surroundings.neutral()
BEFORE, LEFT = pytest.StashKey[dict[str, tuple[int, int]]](), pytest.StashKey[list[str]]()


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a test writes to no particular folder lies in a temporary one, with links to the repository."""
    os.chdir(surroundings.linked(tmp_path_factory.mktemp("elsewhere")))


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals are handled after a test as before it: torch's launcher takes SIGTERM and keeps it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        if handler is not None:  # else it is not Python's
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """No test leaves a handler that writes to its own, by then closed, stderr: Prefect's logging does."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if handler not in before and not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs, to be copied: its tables take MLflow seconds."""
    from spo.tracking.store import Store

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Store(f"sqlite:///{path}").connect()
    return path


HERE = Path(__file__).parent
# these load pipelines and scorers, call DVC, MLflow or Prefect, or start processes: smoke tests, all of them
SLOW = {
    *"adapters backbones flows notebooks publish reliability rewards scenes smoke stages tracking".split(),
    *"cli/test_imports.py commands/test_external.py docs/test_slurm.py evaluation/test_report.py".split(),
    *"runtime/test_cores.py runtime/test_processes.py runtime/test_signals.py".split(),
    "validation/test_scorers.py",
}
FIRST = "tests/smoke/test_dag.py"  # it makes the DAG's run that all of tests/smoke share
TOGETHER = {"tests/flows/test_schedules.py", "tests/flows/test_deployments.py"}  # they share a Prefect server
SHARED = {"clone", "first", "project", "shared"}  # that run, and `experiments.settled`


def is_slow(path: Path) -> bool:
    own = path.relative_to(HERE) if path.is_relative_to(HERE) else Path()
    return str(own) in SLOW or not SLOW.isdisjoint(own.parts[:1])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without smoke tests their files are not even imported: what they need takes 7 s in each process."""
    return True if "not smoke" in config.option.markexpr and is_slow(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Modules that are imported by now are not searched for garbage any more."""
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nightly tests only where -m names them. Files with long tests first, so that no process has one left
    when the others are done.

    Any test that uses a shared fixture may be the one that makes it, or that waits for another process to.
    """
    if "nightly" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.smoke)
        shared = item.get_closest_marker("smoke") and SHARED & {*getattr(item, "fixturenames", ())}
        if shared and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))
    long = {
        item.path for item in items if item.get_closest_marker("smoke") or item.get_closest_marker("services")
    }
    items.sort(key=lambda item: (not item.nodeid.startswith(FIRST), item.path not in long))


@pytest.hookimpl(optionalhook=True)  # of xdist, whose own groups pytest 9.2 passes over without a word
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return min(TOGETHER) if file in TOGETHER else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of xdist
        session.config.stash[BEFORE] = surroundings.traces()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # else libraries that look for leaks at the end report all that was imported
    if not hasattr(session.config, "workerinput"):
        left = session.config.stash[LEFT] = surroundings.left(session.config.stash[BEFORE])
        surroundings.forget()
        if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = config.stash.get(LEFT, [])
    for path in left[:20]:
        terminalreporter.line(f"written outside temporary folders: {path}", red=True)
    if left[20:]:
        terminalreporter.line(f"and {len(left) - 20} more", red=True)
