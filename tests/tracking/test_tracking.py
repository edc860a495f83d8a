"""Stages as MLflow runs, with the server there, away or silent."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spo.runtime import processes
from spo.runtime.files import locked
from spo.tracking import delivery
from spo.tracking import store as stores
from spo.tracking.curve import Curve
from spo.tracking.delivery import sync
from spo.tracking.records import Run, runs_here
from spo.tracking.runs import open_parent, stage_run
from spo.tracking.store import load_mlflow

AWAY = "http://me:pa55word@127.0.0.1:9"
PARAMS: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "tracking": None,
    "align": {"spo": {"beta": 10, "lora": {"rank": 4}}, "diffusion_dpo": {"beta": 2000}},
    "generate": {"eta": 1.0, "base": {"guidance": 2.0}, "spo": {"guidance": 2.5}},
}


def history(folder: Path, run: Any, key: str) -> list[tuple[int, float]]:
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def log_curve(run: Run, folder: Path, *losses: float) -> Curve:
    curve = Curve(run, folder / "scratch")
    curve.resume(0)
    for step, loss in enumerate(losses):
        curve.log({"loss": loss}, step)
    return curve


def test_stages_share_the_parent_of_the_environment(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_parent(PARAMS, "nightly")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    monkeypatch.setenv("DVC_STAGE", "align@spo")
    (folder / "adapter").write_text("weights")
    with stage_run("align", PARAMS, "spo") as run:
        log_curve(run, folder, 1.0, 0.5)
        run.log_artifact("adapter", "files")
        run.log_metrics({"seconds": 12.0})
    with stage_run("generate", PARAMS, "base"):
        pass
    found = runs()
    assert set(found) == {"nightly", "align-spo", "generate-base"}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    top, align, generate = found["nightly"], found["align-spo"], found["generate-base"]
    for child in (align, generate):
        assert child.data.tags["mlflow.parentRunId"] == top.info.run_id
        assert child.data.tags["version.torch"] and child.data.tags["hardware.cpus"]
    assert align.data.tags["dvc.stage"] == "align@spo"
    assert align.data.params == {"seed": "3", "align.spo.beta": "10", "align.spo.lora.rank": "4"}
    assert generate.data.params == {"seed": "3", "generate.eta": "1.0", "generate.base.guidance": "2.0"}
    assert top.data.params["align.diffusion_dpo.beta"] == "2000" and top.data.params["name"] == "tiny"
    assert history(folder, align, "loss") == [(0, 1.0), (1, 0.5)]
    assert align.data.metrics["seconds"] == 12.0
    assert top.data.metrics == {}, "what a stage measured stays with its run"
    stored = Path(align.info.artifact_uri.removeprefix("file://")) / "files/adapter"
    assert stored.read_text() == "weights" and folder / "mlartifacts" in stored.parents


def test_stages_of_one_dvc_repro_share_a_parent(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, started in (("a", 100.0), ("b", 100.0), ("c", 900.0)):
        dvc = SimpleNamespace(pid=4000, create_time=lambda started=started: started)
        monkeypatch.setattr(processes, "dvc_above", lambda dvc=dvc: dvc)
        with stage_run("generate", PARAMS, name):
            time.sleep(1.1 if name == "b" else 0)  # the next parent's name has another second
    parents = {n: r.data.tags.get("mlflow.parentRunId") for n, r in runs().items()}
    assert parents["generate-a"] == parents["generate-b"] != parents["generate-c"]
    assert sum(n.startswith("repro 2") and p is None for n, p in parents.items()) == 2


def test_a_stage_by_hand_is_a_run_of_its_own(folder: Path, runs: Any) -> None:
    with stage_run("align", PARAMS, "spo"):
        pass
    (run,) = runs().values()
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.params["generate.spo.guidance"] == "2.5"


def test_failed_interrupted_and_repeated(folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = open_parent(PARAMS, "parent")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    with pytest.raises(ValueError, match="pa55word"), stage_run("pairs", PARAMS):
        raise ValueError(f"{AWAY} has no pairs")
    with pytest.raises(KeyboardInterrupt), stage_run("prompts", PARAMS):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit), stage_run("align", PARAMS):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    found = runs()
    assert found["pairs"].info.status == "FAILED"
    assert found["pairs"].data.tags["error"] == "ValueError: http://***@127.0.0.1:9 has no pairs"
    assert found["prompts"].info.status == found["align"].info.status == "KILLED"
    assert found["parent"].info.status == "FAILED"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    for stage in ("pairs", "prompts"):
        monkeypatch.setitem(PARAMS, "name", f"again {stage}")
        with stage_run(stage, PARAMS):
            pass
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    status = client.get_run(found["parent"].info.run_id).info.status
    assert status == "KILLED", "the last attempt of each stage counts: align was killed"


def test_a_server_that_is_away_costs_nothing_and_loses_nothing(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(delivery, "PERIOD", 0.05)
    logging.getLogger().addHandler(logging.StreamHandler())  # as Prefect's logging has one
    params = PARAMS | {"tracking": AWAY}
    parent = open_parent(params, "parent")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    load_mlflow()
    started = time.monotonic()
    with stage_run("align", params, "spo") as run:
        log_curve(run, folder, *(1 / (step + 1) for step in range(300)))
        run.log_metrics({"seconds": 12.0})
    ended = 1000 * time.time()
    assert time.monotonic() - started < 300  # 300 records, each of which waits 2 s or more, would take 600 s
    output = capsys.readouterr().err
    assert "spo sync" in output and output.count("\n") == 1 and "pa55word" not in output

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    assert sync(uri) == (2, 0)
    assert sync(uri) == (0, 0)
    found = runs()
    assert history(folder, found["align-spo"], "loss") == [(s, 1 / (s + 1)) for s in range(300)]
    assert found["align-spo"].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
    assert found["align-spo"].info.status == found["parent"].info.status == "FINISHED"
    assert found["align-spo"].info.end_time <= ended, "times are those of the stage, not of the delivery"
    assert [p.name for r in runs_here(parent) for p in r.path.iterdir() if p.name != "lock"] == ["run.json"]


def test_the_next_stage_delivers_what_was_left(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stores.Store, "deliver", lambda *_: 1 / 0)
        with stage_run("pairs", PARAMS):
            pass
    assert len(runs_here()) == 1 and runs() == {}
    with stage_run("prompts", PARAMS):
        pass
    assert set(runs()) == {"pairs", "prompts"} and not any(run.is_pending() for run in runs_here())


def test_a_silent_server_does_not_hold_a_stage_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(delivery.DELIVERY, "remote", 0.5)
    load_mlflow()
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        params = PARAMS | {"tracking": f"http://127.0.0.1:{server.getsockname()[1]}"}
        started = time.monotonic()
        with stage_run("pairs", params) as run:
            run.log_metrics({"rows": 5})
        assert time.monotonic() - started < 300  # MLflow's own seven attempts of 120 s would take minutes
    assert "no answer yet" in capsys.readouterr().err
    assert [run.is_pending() for run in runs_here()] == [True]


def test_after_a_stop_a_silent_server_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(delivery, "STOPPED_DELIVERY", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    open_parent(PARAMS, "parent")
    load_mlflow()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert sync(f"http://127.0.0.1:{server.getsockname()[1]}", stopped=True) == (0, 1)
    assert "no answer yet" in capsys.readouterr().err


def test_a_folder_without_a_place_to_write_only_warns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".spo").write_text("not a folder")
    with stage_run("pairs", PARAMS) as run:
        run.log_metrics({"rows": 5})
    assert "logs nothing" in capsys.readouterr().err


def test_a_broken_store_only_warns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mlflow.db").write_bytes(b"this is no database" * 100)
    started = time.monotonic()
    with stage_run("pairs", PARAMS):
        pass
    assert time.monotonic() - started < 300
    assert "not a database" in capsys.readouterr().err


def test_no_password_reaches_the_store(folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = PARAMS | {"tracking": f"sqlite:///{folder / 'mlflow.db'}", "data": {"source": AWAY}}
    with stage_run("data", params | {"to": f"{AWAY}/x?token=pa55word"}) as run:
        run.set_tags({"from": AWAY})
    tags, logged = runs()["data"].data.tags, runs()["data"].data.params
    assert tags["from"] == logged["data.source"] == "http://***@127.0.0.1:9"
    kept = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert b"pa55word" not in kept


def test_one_process_at_a_time_opens_a_sqlite_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once break MLflow's migration of a new file, which its client does when it is made."""
    opened: list[str] = []
    monkeypatch.setattr(stores, "load_mlflow", lambda: SimpleNamespace(MlflowClient=opened.append))
    store = stores.Store(f"sqlite:///{folder / 'mlflow.db'}")
    with locked(folder / "mlflow.db.lock"):
        other = threading.Thread(target=store.connect)
        other.start()
        other.join(0.3)
        assert other.is_alive() and opened == []
    other.join()
    assert opened == [store.uri]


def test_only_the_first_process_of_a_training_logs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with stage_run("align", PARAMS) as run:
        run.log_metrics({"loss": 1.0})
    assert not (folder / ".spo").exists()


def test_a_mistyped_parent_is_said_and_ignored(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPO_PARENT_RUN", "../nobody")
    with stage_run("pairs", PARAMS):
        pass
    assert "SPO_PARENT_RUN names no run" in capsys.readouterr().err
    assert set(runs()) == {"pairs"}


def test_repro_delivers_what_its_stages_log_while_they_run(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the stage delivers, and imports MLflow for that")

    monkeypatch.setattr(delivery, "PERIOD", 0.05)
    monkeypatch.setattr("spo.tracking.runs.Delivery", refuse)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    parent = open_parent(PARAMS, "parent")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    with delivery.for_stages(uri, parent) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with stage_run("generate", PARAMS, "base") as run:
            log_curve(run, folder, 1.0, 0.5)
            limit = time.monotonic() + 600
            while "generate-base" not in runs() and time.monotonic() < limit:
                time.sleep(0.05)
            while "system/cpu_utilization_percentage" not in runs()["generate-base"].data.metrics:
                time.sleep(0.05)
            assert history(folder, runs()["generate-base"], "loss") == [(0, 1.0), (1, 0.5)]
    assert sync(uri)[1] == 0
    found = runs()["generate-base"]
    assert found.info.status == "FINISHED" and any(name.startswith("system/") for name in found.data.metrics)
