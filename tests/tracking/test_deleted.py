"""What was deleted in MLflow: nothing is restored unasked or lost, and one line says what would serve."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spo import cli
from spo.tracking.delivery import sync
from spo.tracking.records import Run, runs_here
from spo.tracking.runs import open_parent, stage_run
from spo.tracking.store import Store, load_mlflow

PARAMS: dict[str, Any] = {"name": "tiny", "seed": 3, "tracking": None, "align": {"spo": {"beta": 10}}}
CONNECT = Store.connect
FIGURES = {"spo.gain": 0.25, "accuracy": 0.5}  # of a parent, by the stage `report`


@pytest.fixture
def client(folder: Path, runs: Any) -> Any:
    """Of the folder's store."""
    return load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of tracking."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


def run_stage(name: str = "pairs", during: Callable[[], Any] = lambda: None, params: Any = PARAMS) -> None:
    with stage_run(name, params) as run:
        run.log_metrics({"rows": 5.0})
        during()
        run.log_metrics({"loss": 0.5})


def delivered(folder: Path, client: Any) -> None:
    """Everything of `pairs` is in MLflow, once."""
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = [r for r in client.search_runs([experiment]) if r.info.run_name == "pairs"]
    assert run.info.status == "FINISHED" and run.data.params["seed"] == "3"
    assert run.data.tags["hardware.cpus"]
    for name, value in (("rows", 5.0), ("loss", 0.5)):
        assert [m.value for m in client.get_metric_history(run.info.run_id, name)] == [value]


def nothing_waits() -> bool:
    return not any(run.is_pending() for run in runs_here())


def test_an_experiment_deleted_before_a_stage_is_named_and_all_comes_after_its_restoration(
    folder: Path, client: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = client.create_experiment("tiny")
    client.delete_experiment(number)
    run_stage()
    restore = (
        f"the experiment 'tiny' was deleted; `mlflow experiments restore --experiment-id {number}` brings"
    )
    line = printed(capsys)
    assert restore in line and line.endswith("the run stays in .spo/runs, `spo sync` delivers it")
    assert cli.main(["sync"]) == 2
    output = capsys.readouterr()
    assert "0 runs delivered" in output.out
    assert restore in output.err and "sync: " in output.err and "away" not in output.err
    assert client.get_experiment(number).lifecycle_stage == "deleted", "only a person restores it"

    from mlflow.experiments import restore_experiment

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    restore_experiment.main(["--experiment-id", number], standalone_mode=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["sync"]) == 0 and nothing_waits()
    delivered(folder, client)


@pytest.mark.parametrize("gone", ["experiment", "run"])
def test_what_is_deleted_while_a_stage_runs_waits_for_its_restoration(
    folder: Path,
    client: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gone: str,
) -> None:
    """The run is there already; what comes after its deletion is refused by MLflow, but not for good."""

    def delete() -> None:
        (run,) = runs_here()
        Store(f"sqlite:///{folder / 'mlflow.db'}").deliver(run)
        experiment = client.get_experiment_by_name("tiny").experiment_id
        (run,) = client.search_runs([experiment])
        if gone == "run":
            client.delete_run(run.info.run_id)
        else:
            client.delete_experiment(experiment)

    run_stage(during=delete)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = client.search_runs([experiment], run_view_type=3)
    line = printed(capsys)
    if gone == "run":
        assert f"run {run.info.run_id} was deleted; `mlflow runs restore --run-id {run.info.run_id}`" in line
        client.restore_run(run.info.run_id)
    else:
        assert f"`mlflow experiments restore --experiment-id {experiment}` brings it back" in line
        client.restore_experiment(experiment)
    assert sync()[1] == 0 and nothing_waits()
    delivered(folder, client)


def test_a_run_that_is_deleted_for_good_is_delivered_anew(
    folder: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def delete() -> None:
        (run,) = runs_here()
        Store(f"sqlite:///{folder / 'mlflow.db'}").deliver(run)
        (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        client._tracking_client.store._hard_delete_run(run.info.run_id)

    run_stage(during=delete)
    assert capsys.readouterr().err == "" and nothing_waits()
    delivered(folder, client)


def test_a_store_that_was_replaced_by_a_new_one_gets_all(
    folder: Path, client: Any, fresh_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage's run went to the store before."""
    parent = open_parent(PARAMS, "nightly")
    parent.log_metrics(FIGURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPO_PARENT_RUN", parent.key)
        run_stage("prompts")
        shutil.copy(fresh_store, folder / "mlflow.db")
        run_stage()
    assert capsys.readouterr().err == ""
    new = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    delivered(folder, new)
    found = {r.info.run_name: r for r in new.search_runs([new.get_experiment_by_name("tiny").experiment_id])}
    assert set(found) == {"nightly", "pairs"}
    assert found["pairs"].data.tags["mlflow.parentRunId"] == found["nightly"].info.run_id
    assert found["nightly"].data.metrics == FIGURES


def test_an_experiment_deleted_for_good_is_made_anew(folder: Path, client: Any) -> None:
    number = client.create_experiment("tiny")
    client.delete_experiment(number)
    client._tracking_client.store._hard_delete_experiment(number)
    run_stage()
    assert nothing_waits()
    delivered(folder, client)


def test_a_deleted_parent_holds_up_no_child(
    folder: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = open_parent(PARAMS, "nightly")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    run_stage("prompts")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    top = next(r for r in client.search_runs([experiment]) if r.info.run_name == "nightly").info.run_id
    client.delete_run(top)
    parent.log_metrics(FIGURES)
    run_stage()
    assert f"`mlflow runs restore --run-id {top}`" in printed(capsys)
    delivered(folder, client)
    client.restore_run(top)
    assert sync()[1] == 0
    assert client.get_run(top).data.metrics == FIGURES


def test_the_figures_of_a_cached_stage_wait_for_its_deleted_parent(folder: Path, client: Any) -> None:
    parent = open_parent(PARAMS, "nightly")
    assert sync()[1] == 0
    (top,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    client.delete_run(top.info.run_id)
    tags = {"dvc.cached": "true", "dvc.lock_hash": "ab12"}
    cached = {"status": "FINISHED", "end": 1, "metrics": {"rows": 5.0}}
    Run.create({"name": "report", "experiment": "tiny", "params": {}, "tags": tags} | cached, parent.key)
    parent.log_metrics(FIGURES)
    assert sync()[1] == 2
    client.restore_run(top.info.run_id)
    assert sync()[1] == 0
    assert client.get_run(top.info.run_id).data.metrics == FIGURES


def test_what_waits_does_not_hold_up_other_experiments(
    folder: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client.delete_experiment(client.create_experiment("closed"))
    for name in ("pairs", "prompts"):
        run_stage(name, params=PARAMS | {"name": "closed"})
    run_stage()
    delivered(folder, client)
    capsys.readouterr()
    assert sync() == (0, 2)
    assert "was deleted; `mlflow experiments restore" in printed(capsys)


def test_a_parent_may_be_a_run_that_mlflow_has(
    folder: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = client.create_run(client.create_experiment("tiny")).info.run_id
    monkeypatch.setenv("SPO_PARENT_RUN", top)
    run_stage()
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert [r.data.tags["mlflow.parentRunId"] for r in found if r.info.run_name == "pairs"] == [top]


@pytest.mark.parametrize(
    "name", ["it's", 'a "b"', "end\\", "ünï 円", "a/b:c", "..", "tags.`x` = 'y'", "a\tb"]
)
def test_any_name_of_an_experiment_gets_its_runs(folder: Path, client: Any, name: str) -> None:
    parent = open_parent(PARAMS | {"name": name}, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPO_PARENT_RUN", parent.key)
        run_stage(params=PARAMS | {"name": name})
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert {r.info.run_name for r in found} == {name, "pairs"}
    assert {r.info.status for r in found} == {"FINISHED"} and nothing_waits()


def test_a_name_that_mlflow_refuses_is_said_to_be_the_reason(
    folder: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(params=PARAMS | {"name": "x" * 600})
    line = printed(capsys)
    assert "no experiment name of more than 500 characters; give another `name` in params.yaml" in line


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("schema", "found version 451aebb31d03, but expected .* run 'mlflow db upgrade"),
        ("full", "database or disk is full"),
        ("read only", "readonly database"),
        ("malformed", "database disk image is malformed"),
    ],
)
def test_a_store_that_takes_nothing_is_said_to_be_the_reason_and_nothing_is_lost(
    folder: Path,
    client: Any,
    fresh_store: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: str,
    reason: str,
) -> None:
    file = folder / "spoilt.db"
    shutil.copy(fresh_store, file)
    if spoil == "schema":
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
            connection.commit()
    elif spoil == "malformed":
        content = bytearray(file.read_bytes())
        for page in range(4096, len(content), 4096):
            content[page : page + 2000] = b"\xff" * 2000
        file.write_bytes(content)
    else:
        limits = {"full": "PRAGMA max_page_count = 1", "read only": "PRAGMA query_only = 1"}
        monkeypatch.setattr(Store, "connect", _with_pragma(Store.connect, limits[spoil]))
    notes = {str(i): "- " * 2500 for i in range(30)}  # more than the free room of a full file
    run_stage(params=PARAMS | {"notes": notes, "tracking": f"sqlite:///{file}"})
    line = printed(capsys)
    assert re.search(reason, line) and line.endswith("`spo sync` delivers it")
    monkeypatch.setattr(Store, "connect", CONNECT)
    assert sync(f"sqlite:///{folder / 'mlflow.db'}")[1] == 0 and nothing_waits()
    delivered(folder, client)


def _with_pragma(connect: Any, pragma: str) -> Any:
    """A store whose connections to sqlite have a limit, as a full disk or a file without permission has."""
    import sqlalchemy

    def connected(store: Store) -> Any:
        client = connect(store)
        engine = client._tracking_client.store.engine
        if not getattr(engine, "limited", False):
            engine.limited = True
            engine.dispose()
            sqlalchemy.event.listen(engine, "connect", lambda connection, _: connection.execute(pragma))
        return client

    return connected
