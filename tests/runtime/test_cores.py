"""The number of cores and threads, and how threads wait, by environment, affinity and container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo.runtime import cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("900000 100000", 4),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert cores.count() == 4, "no container"
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.count() == expected


@pytest.mark.parametrize(
    ("given", "processes", "added", "message"),
    [
        ({}, 1, {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"}, "threads: 4 (4 cores); they sleep"),
        (
            {},
            3,
            {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            "threads: 1 (4 cores for 3 processes)",
        ),
        ({"OMP_NUM_THREADS": "2"}, 1, {"OMP_WAIT_POLICY": "PASSIVE"}, "threads: 2, as OMP_NUM_THREADS says"),
        ({"OMP_WAIT_POLICY": "active"}, 1, {"OMP_NUM_THREADS": "4"}, "they wait as OMP_WAIT_POLICY says"),
        ({"GOMP_SPINCOUNT": "9"}, 1, {"OMP_NUM_THREADS": "4"}, "they wait as GOMP_SPINCOUNT says"),
    ],
)
def test_what_the_user_set_holds_and_one_line_says_all(
    given: dict[str, str],
    processes: int,
    added: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "count", lambda: 4)
    variables = dict(given)
    line = cores.set_threads(variables, processes)
    assert variables == given | added
    assert message in line and "\n" not in line


COMMAND = """
import sys
from spo import cli
from spo.runtime import cores
cores.count = lambda: 1
def work(params, variant):
    assert "torch" not in sys.modules
    import torch
    print(torch.get_num_threads())
import spo.stages.score
spo.stages.score.run = work
sys.argv = ["spo", "score", "base"]
sys.exit(cli.main())
"""


def test_a_stage_sets_them_before_torch_is_there() -> None:
    names = (cores.THREADS, *cores.WAITING, "RANK")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "1\n", done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("spo: threads")]
    assert "(1 core)" in line
