"""Secrets stay where they were given; servers are reached from this machine only."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import in_fork
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from ports import free_port

from spo import cli, config
from spo.publish import card as cards
from spo.tracking.store import load_mlflow

ROOT = Path(__file__).parents[2]
SECRET = "planted-70ken"
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{SECRET}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{SECRET}",
    "AWS_ACCESS_KEY_ID": f"AKIA{SECRET}",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "PREFECT_API_KEY": SECRET,
}


@pytest.fixture
def folder(tmp_path: Path, fresh_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    row = {"jpg_0": png(), "jpg_1": png(9), "label_0": 1.0, "label_1": 0.0}
    pq.write_table(pa.Table.from_pylist([row | {"caption": f"{i}"} for i in range(12)]), pairs / "0.parquet")
    return tmp_path


def png(size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder: Path, **changes: Any) -> None:
    params = yaml.safe_load(config.preset("smoke"))
    params["pairs"] = {"source": "pairs", "validation_fraction": 0.4}
    for key, value in changes.items():
        section, name = key.split("__")
        params[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


Done: TypeAlias = "subprocess.CompletedProcess[str]"
Command: TypeAlias = Callable[..., Done]


@pytest.fixture
def spo(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """A command in the folder, run in this process, which has the libraries."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        status = cli.main(arguments)
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, shown.out, shown.err)

    return run


def leaks(folder: Path, done: Done) -> list[str]:
    """Where the secret is, but for params.yaml, where the user wrote it."""
    found = [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    return [p for p in found if not p.endswith("params.yaml")] + (
        ["output"] if SECRET in done.stdout + done.stderr else []
    )


@pytest.mark.smoke
def test_a_stage_that_works_keeps_none(folder: Path, spo: Command) -> None:
    """With MLflow's store, its params, tags and artifacts, and a URL with a password in another section."""
    write(folder, backbone__checkpoint=f"https://me:{SECRET}@example.org/model?token={SECRET}")
    done = spo("pairs")
    assert done.returncode == 0, done.stderr
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.status for run in client.search_runs(experiments)] == ["FINISHED"]
    assert (folder / "outputs/pairs/summary.json").exists()
    assert leaks(folder, done) == []


def test_a_tracking_server_that_is_away_is_named_without_it(folder: Path) -> None:
    write(folder)
    away = os.environ | {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9"}
    done = in_fork.spo(folder, "pairs", variables=away)
    assert done.returncode == 0 and "http://***@127.0.0.1:9" in done.stderr
    assert list((folder / ".spo/runs").glob("*/run.json")), "the run waits there"
    assert leaks(folder, done) == []


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"backbone__checkpoint": f"https://me:{SECRET}@127.0.0.1:9/model"}, ("prompts",)),
        ({"pairs__source": f"s3://me:{SECRET}@bucket/pairs?token={SECRET}"}, ("pairs",)),
        ({"pairs__source": f"http://127.0.0.1:9/pairs?access_token={SECRET}"}, ("inputs",)),
        ({"preference__init": f"https://me:{SECRET}@127.0.0.1:9/clip"}, ("preference", "--dry-run")),
        ({"backbone__checkpoint": "someone/model"}, ("align", "spo", "--dry-run")),
    ],
)
def test_an_error_names_the_address_without_it(
    folder: Path, spo: Command, changes: dict[str, str], command: tuple[str, ...]
) -> None:
    write(folder, **changes)
    done = spo(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert leaks(folder, done) == []


def test_a_model_card_has_none() -> None:
    raw = yaml.safe_load(config.preset("smoke"))
    raw["backbone"]["checkpoint"] = f"https://me:{SECRET}@example.org/model"
    raw["prompts"]["train"] = f"https://example.org/prompts.txt?token={SECRET}"
    card = cards.of_training(config.validate(raw), "spo", {})
    assert SECRET not in card and "https://***@example.org/model" in card


def test_every_server_that_we_start_or_recommend_is_on_the_loopback_interface() -> None:
    """mlflow and prefect listen at 127.0.0.1 by default; ours have the option in any case."""
    found = 0
    places = ["Makefile", "README.md", "docs/team.md", "flows/prefect.yaml", "flows/serving.py"]
    for place in places:
        text = (ROOT / place).read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:mlflow (?:ui|server)|prefect server start)(?: --[^`#\"\n]*)", text):
            found += 1
            assert "--host 127.0.0.1" in line, f"{place}: {line}"
        assert "0.0.0.0" not in text, place
    assert found >= 4


@pytest.mark.nightly
def test_make_ui_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    shown = subprocess.run(["make", "-n", "ui"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "mlflow ui" in line]
    port = free_port()
    variable, _, *options = shlex.split(re.sub(r"--port \d+", f"--port {port}", line))
    command = [sys.executable, "-m", "mlflow", *options]
    environment = {**os.environ, **dict([variable.split("=")])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet) as server:
        try:
            deadline = time.monotonic() + 600
            while not (found := listening(server.pid)):
                assert time.monotonic() < deadline and server.poll() is None, "the server does not start"
                time.sleep(0.5)
            assert (("127.0.0.1", port)) in found
            assert {address for address, _ in found} == {"127.0.0.1"}
        finally:
            for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses at which a process and its children accept connections."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child that ended since
            found |= {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return {(address.ip, address.port) for address in found}
