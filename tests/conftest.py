"""For all tests: no network, no state of the person who runs them, few threads."""

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("SPO_PARENT_RUN", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = "tests/smoke"  # the longest, and its files share a run of the DAG: one process has them, and first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _unit(item.nodeid) != SHARED)


@pytest.hookimpl(optionalhook=True)  # of xdist, whose own groups pytest 9.2 passes over without a word
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    config.option.loadscopereorder = False
    return ByUnit(config, log)


def _unit(nodeid: str) -> str:
    """What stays in one process: a file, or the folder that shares."""
    return SHARED if nodeid.startswith(f"{SHARED}/") else nodeid.split("::")[0]
