"""A team's day: two clones, a shared remote, experiments handed over; with the real git and DVC."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

SECRET = "planted-aws-secret"
# thirty commands of a second or two; the default suite has the main ones in tests/docs/test_dvc_commands.py
pytestmark = [pytest.mark.smoke, pytest.mark.nightly]
ROOT = Path(__file__).parents[2]
DAG = """\
stages:
  prompts:
    cmd: cp data/raw.txt prompts.txt
    deps: [data/raw.txt]
    outs: [prompts.txt]
  align:
    cmd: python align.py
    deps: [prompts.txt, align.py]
    params: [beta]
    outs: [adapter.txt]
    metrics: [{metrics.json: {cache: false}}]
    plots: [{curve.csv: {cache: false, x: step, y: loss}}]
"""
ALIGN = """\
import json, yaml
beta = yaml.safe_load(open("params.yaml"))["beta"]
open("adapter.txt", "w").write(f"{beta}\\n")
json.dump({"gain": 0.1 * beta}, open("metrics.json", "w"))
open("curve.csv", "w").write("step,loss\\n0,1\\n" + f"1,{1 / beta}\\n")
"""


class Clone:
    """A folder and the commands run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
        }
        for role in ("AUTHOR", "COMMITTER"):
            variables |= {f"GIT_{role}_NAME": "one", f"GIT_{role}_EMAIL": "one@example.org"}
        self.environment = {**os.environ, **variables}

    def __call__(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert (done.returncode != 0) == fails, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def commit(self, message: str) -> None:
        self("git", "add", "-A")
        self("git", "commit", "-qm", message)


@pytest.fixture
def team(tmp_path: Path) -> tuple[Clone, Clone, Path]:
    """(who made and pushed the first run, a second clone, the seed remote inside the repository)."""
    shared, bare = tmp_path / "shared", tmp_path / "origin.git"
    shared.mkdir()
    first = Clone(tmp_path / "first")
    first.folder.mkdir()
    first("git", "init", "-q", "--bare", "-b", "main", str(bare))
    first("git", "init", "-q", "-b", "main")
    first("dvc", "init", "-q")
    shutil.copy(ROOT / ".dvc/config", first.folder / ".dvc/config")  # the seed remote, as shipped
    (first.folder / ".dvc-seed").mkdir()
    (first.folder / "data").mkdir()
    (first.folder / "data/raw.txt").write_text("a circle\na star\n")
    (first.folder / "dvc.yaml").write_text(DAG)
    (first.folder / "align.py").write_text(ALIGN)
    (first.folder / "params.yaml").write_text("beta: 2\n")
    first("dvc", "remote", "add", "-q", "--local", "-d", "team", str(shared))
    first("dvc", "repro", "-q")
    first.commit("the first run")
    first("git", "remote", "add", "origin", str(bare))
    first("git", "push", "-q", "-u", "origin", "main")
    first("dvc", "push", "-q")
    first("git", "clone", "-q", str(bare), str(tmp_path / "second"))
    second = Clone(tmp_path / "second")
    second("dvc", "remote", "add", "-q", "--local", "-d", "team", str(shared))
    return first, second, first.folder / ".dvc-seed"


def test_a_second_clone_varies_compares_and_hands_back(team: tuple[Clone, Clone, Path]) -> None:
    first, second, seed = team
    second("dvc", "pull", "-q")
    assert (second.folder / "adapter.txt").read_text() == "2\n"
    assert "Running stage" not in second("dvc", "repro"), "nothing is to do in a fresh clone"

    output = second("dvc", "exp", "run", "-S", "beta=5", "--name", "beta-5")
    assert "Running stage 'align'" in output and "Running stage 'prompts'" not in output
    (change,) = json.loads(second("dvc", "metrics", "diff", "--json"))["metrics.json"].values()
    assert change["diff"] == pytest.approx(0.3)
    shown = second("dvc", "exp", "show", "--csv")
    assert "beta-5" in shown and "0.5" in shown
    assert "index.html" in second("dvc", "plots", "diff", "HEAD")
    second("dvc", "exp", "push", "origin", "beta-5")

    first("dvc", "exp", "pull", "origin", "beta-5")
    first("dvc", "exp", "apply", "beta-5")
    assert (first.folder / "adapter.txt").read_text() == "5\n"
    assert not list(seed.rglob("*")), "a push never writes the seed remote"


def test_queued_experiments_run_two_at_a_time(team: tuple[Clone, Clone, Path]) -> None:
    first, _, _ = team
    for beta in (3, 4, 6):
        first("dvc", "exp", "run", "--queue", "-S", f"beta={beta}", "--name", f"q{beta}")
    first("dvc", "exp", "run", "--run-all", "--jobs", "2")
    shown = first("dvc", "exp", "show", "--csv")
    for beta in (3, 4, 6):
        (row,) = [line for line in shown.splitlines() if f"q{beta}" in line]
        assert f"{0.1 * beta:.5}".rstrip("0") in row and "Failed" not in row
    assert (first.folder / "adapter.txt").read_text() == "2\n", "the workspace stays as it was"


def test_a_remote_that_refuses_is_said_and_nothing_is_lost(team: tuple[Clone, Clone, Path]) -> None:
    first, _, _ = team
    first("dvc", "remote", "add", "-q", "--local", "-f", "team", "/proc/nowhere")
    output = first("dvc", "push", fails=True)
    assert "ERROR" in output and "Traceback" not in output
    assert (first.folder / "adapter.txt").read_text() == "2\n"


@pytest.fixture
def store() -> Iterator[str]:
    """The address of an S3-compatible server with the bucket `team`."""
    pytest.importorskip("dvc_s3", reason="DVC's S3 remote is not installed: pip install dvc-s3")
    pytest.importorskip("moto", reason="the S3-compatible server is not installed: pip install 'moto[s3]'")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 600
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(urllib.request.Request(f"{url}/team", method="PUT"))
                    break
                assert time.monotonic() < deadline and server.poll() is None, "the server does not start"
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@pytest.mark.services
def test_an_s3_store_is_a_remote_too(team: tuple[Clone, Clone, Path], store: str) -> None:
    output = ""
    for clone in team[:2]:
        clone.environment |= {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}
        clone("dvc", "remote", "add", "--local", "s3", "s3://team/spo")
        clone("dvc", "remote", "modify", "--local", "s3", "endpointurl", store)
    first, second, seed = team
    output += first("dvc", "push", "-r", "s3")
    output += second("dvc", "pull", "-r", "s3")
    assert (second.folder / "adapter.txt").read_text() == "2\n"
    assert "Running stage" not in second("dvc", "repro")
    output += second("dvc", "remote", "modify", "--local", "s3", "endpointurl", "http://127.0.0.1:9")
    output += second("dvc", "push", "-r", "s3", fails=True)
    assert SECRET not in output
    assert not list(seed.rglob("*")), "a push never writes the seed remote"
    for folder in (first.folder, second.folder):
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert SECRET.encode() not in path.read_bytes(), path
