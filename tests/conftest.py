"""For all tests: no network, no state of the person who runs them, few threads."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("SPO_PARENT_RUN", None)

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes on two cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = "tests/smoke/"  # the longest, and they share a run of the DAG


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is one process's, the smoke folder too; it begins."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    for item in items:
        place = item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(FIRST if place.startswith(FIRST) else place))
