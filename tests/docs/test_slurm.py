"""docs/slurm.sh, run by bash with stand-ins for SLURM and for spo; no cluster was at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spo import cli

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs/slurm.sh"
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node-a\\nnode-b\\n' || echo "$@" >> requeued
"""
SPO = """#!{python}
import json, os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open("ran", "a") as file:
    print(json.dumps([sys.argv[1:], *(os.environ[name] for name in names)]), file=file)
if os.environ["LEFT"]:
    pathlib.Path(os.environ["SPO_EXIT_FILE"]).write_text(os.environ["LEFT"])
sys.exit(int(os.environ["ENDS"]))
"""
JOB = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node-[a-b]",
}


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "spo": SPO.format(python=sys.executable)}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, ends: int, left: str = "", restarts: str = "0") -> tuple[int, bool]:
    """The script's exit code, and whether the job was queued again."""
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    variables = {**JOB, "PATH": path, "ENDS": str(ends), "LEFT": left, "SLURM_RESTART_COUNT": restarts}
    command = ["bash", str(SCRIPT), "align", "spo"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, (folder / "requeued").exists()


def test_bash_reads_it() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_names_a_stage_that_runs_in_several_processes() -> None:
    (words,) = re.findall(r"^#   sbatch docs/slurm.sh (.*)$", SCRIPT.read_text(), re.MULTILINE)
    arguments = cli.parser().parse_args(words.split())
    assert arguments.stage == "align" and arguments.uses_torch


def test_every_task_knows_its_place(cluster: Path) -> None:
    assert submit(cluster, 0) == (0, False)
    ran = [json.loads(line) for line in (cluster / "ran").read_text().splitlines()]
    assert ran == [[["align", "spo"], str(rank), "0", "2", "1", "node-a", "22345"] for rank in (0, 1)]


@pytest.mark.parametrize(
    ("ends", "left", "restarts", "code", "again"),
    [
        (2, "2", "0", 2, False),
        (75, "75", "0", 75, True),
        (130, "", "0", 130, True),
        (143, "", "0", 143, True),
        (137, "75", "0", 75, True),
        (1, "", "0", 1, False),
        (75, "75", "10", 75, False),
    ],
)
def test_what_may_pass_by_itself_is_queued_again(
    cluster: Path, ends: int, left: str, restarts: str, code: int, again: bool
) -> None:
    assert submit(cluster, ends, left, restarts) == (code, again)


def test_the_page_shows_its_lines() -> None:
    (shown,) = re.findall(r"```\n(#!/bin/bash\n.*?)```", (ROOT / "docs/scale.md").read_text(), re.DOTALL)
    assert "srun" in shown
    for line in shown.strip().splitlines():
        assert line in SCRIPT.read_text().splitlines()
