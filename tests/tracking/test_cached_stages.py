"""Cached stages are runs too, with their metrics and a link to the run that made their outputs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow_runs import children

from spo.runtime.workspace import home
from spo.tracking import cached_stages, dvc_lock
from spo.tracking.curve import Curve
from spo.tracking.delivery import is_recorded, sync
from spo.tracking.runs import close_parent, open_parent, stage_run
from spo.tracking.store import load_mlflow, tracking_uri

PARAMS: dict[str, Any] = {"name": "tiny", "seed": 3, "tracking": None, "align": {"spo": {"beta": 10}}}
ENTRIES = {
    "pairs": {"cmd": "spo pairs", "deps": {"data": "d1.dir"}, "outs": {"outputs/pairs": "p1.dir"}},
    "align@spo": {
        "cmd": "spo align spo",
        "deps": {"outputs/pairs": "p1.dir", "src/spo/training/loop.py": "c1"},
        "outs": {"outputs/align/spo": "a1.dir", "reports/metrics/align_spo.json": "m1"},
    },
    "other": {"cmd": "sh other.sh", "deps": {"data": "d1.dir"}, "outs": {"other": "o1"}},
    "report": {
        "cmd": "spo report",
        "deps": {"outputs/align": "a2.dir"},
        "outs": {"reports/report.html": "r1", "reports/metrics/report.json": "n1"},
    },
}


def write_lock(folder: Path, **changes: str) -> None:
    stages = {
        name: {
            "cmd": stage["cmd"],
            **{
                kind: [{"path": p, "md5": changes.get(h, h)} for p, h in stage[kind].items()]
                for kind in ("deps", "outs")
            },
        }
        for name, stage in ENTRIES.items()
    }
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))


@pytest.fixture
def locked_folder(folder: Path) -> Path:
    write_lock(folder)
    metrics = folder / "reports/metrics/align_spo.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"updates": 7, "by_step": {"1": 0.5}, "note": "text"}))
    metrics.with_name("report.json").write_text(json.dumps({"spo": {"gain": 0.25}}))
    return folder


def test_what_a_stage_is_made_from(locked_folder: Path) -> None:
    entries = dvc_lock.read()
    assert dvc_lock.ancestors(entries, "report") == ["pairs", "align@spo"], "other is no part of it"
    assert dvc_lock.ancestors(entries, "pairs") == dvc_lock.ancestors(entries, "nothing") == []
    assert entries["align@spo"].title == "align-spo" and entries["other"].title == "other"
    assert entries["align@spo"].metrics() == {"updates": 7.0, "by_step/1": 0.5}
    before = entries["align@spo"].hash
    write_lock(locked_folder, c1="c2")
    assert (
        dvc_lock.read()["align@spo"].hash != before and dvc_lock.read()["pairs"].hash == entries["pairs"].hash
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "]",
        "stages: [1]",
        "stages: {a: {}}",
        "<<<<<<< HEAD\nstages: {}\n",
        "stages:\n  a:\n   b",
        "a: 1\na: 2",
    ],
)
def test_only_a_missing_lock_file_is_empty(folder: Path, text: str) -> None:
    assert dvc_lock.read() == {}
    (folder / "dvc.lock").write_text(text)
    with pytest.raises(ValueError, match=r"^dvc.lock: [^\n]*; resolve its conflict, or restore it by `git"):
        dvc_lock.read()


def stage(
    monkeypatch: pytest.MonkeyPatch, dvc: str, name: str, item: str | None, params: Any, **metrics: float
) -> None:
    monkeypatch.setenv("DVC_STAGE", dvc)
    with stage_run(name, params, item) as run:
        curve = Curve(run, Path("scratch"))
        curve.resume(0)
        curve.log({"loss": 9.0}, 3)
        run.log_metrics(metrics)
    monkeypatch.delenv("DVC_STAGE")


def find_parent(folder: Path, name: str) -> Any:
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (found,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return found


def test_cached_stages_are_linked_and_the_parents_compare(
    locked_folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_parent(PARAMS, "first")
    monkeypatch.setenv("SPO_PARENT_RUN", first.key)
    stage(monkeypatch, "pairs", "pairs", None, PARAMS, rows=5)
    stage(monkeypatch, "align@spo", "align", "spo", PARAMS, accuracy=0.75)
    stage(monkeypatch, "report", "report", None, PARAMS, win_rate=0.9)
    first.log_metrics({"spo/gain": 0.9})  # as the report does
    close_parent(first, PARAMS, "FINISHED", ())
    changed = PARAMS | {"report": {"grid": 8}}
    second = open_parent(changed, "second")
    monkeypatch.setenv("SPO_PARENT_RUN", second.key)
    write_lock(locked_folder, r1="r2")
    stage(monkeypatch, "report", "report", None, changed, win_rate=0.8)
    second.log_metrics({"spo/gain": 0.8})
    close_parent(second, changed, "FINISHED", ())
    assert sync()[1] == 0

    one, two = find_parent(locked_folder, "first"), find_parent(locked_folder, "second")
    made, taken = children(locked_folder, one.info.run_id), children(locked_folder, two.info.run_id)
    assert set(made) == set(taken) == {"pairs", "align-spo", "report"}
    for name in ("pairs", "align-spo"):
        run, origin = taken[name], made[name]
        assert run.data.tags["dvc.cached"] == "true" and origin.data.tags["dvc.cached"] == "false"
        assert run.data.tags["origin_run_id"] == origin.info.run_id
        assert run.data.tags["dvc.lock_hash"] == origin.data.tags["dvc.lock_hash"]
        assert run.data.params == origin.data.params and run.info.status == "FINISHED"
    assert taken["report"].data.tags["dvc.cached"] == "false"
    assert taken["align-spo"].data.metrics == {"accuracy": 0.75}, "no curves"
    assert taken["align-spo"].data.tags["dvc.out.outputs/align/spo"] == "a1.dir"
    datasets = {i.dataset.name: i.dataset.digest for i in made["align-spo"].inputs.dataset_inputs}
    assert datasets == {"outputs/pairs": "p1.dir"}, "code is no data"
    assert (one.data.metrics, two.data.metrics) == ({"spo/gain": 0.9}, {"spo/gain": 0.8})
    assert taken["report"].data.metrics == {"loss": 9.0, "win_rate": 0.8}, (
        "those of a stage stay with its run"
    )
    differ = {k for k in two.data.params if one.data.params.get(k) != two.data.params[k]}
    assert differ == {"report.grid"}


def test_a_repro_in_which_nothing_ran(locked_folder: Path, runs: Any) -> None:
    parent = open_parent(PARAMS, "nothing")
    assert close_parent(parent, PARAMS, "FINISHED", dvc_lock.read()) == list(ENTRIES)
    assert sync()[1] == 0
    found = find_parent(locked_folder, "nothing")
    cached = children(locked_folder, found.info.run_id)
    assert set(cached) == {"pairs", "align-spo", "other", "report"}
    assert cached["align-spo"].data.tags["origin_run_id"] == "not in this store"
    assert cached["align-spo"].data.metrics == {"updates": 7.0, "by_step/1": 0.5}, "of the metrics file"
    assert found.data.metrics == {"spo/gain": 0.25}, "the numbers to compare, of the report's file"


@pytest.mark.parametrize(
    ("reached", "written", "known"),
    [((), False, False), ((), True, True), (("pairs",), False, True), (("align@spo",), True, True)],
)
def test_a_run_gets_an_entry_that_was_written_since_or_that_dvc_came_to(
    locked_folder: Path,
    runs: Any,
    monkeypatch: pytest.MonkeyPatch,
    reached: tuple[str, ...],
    written: bool,
    known: bool,
) -> None:
    """Not the old one of a stage that ended well and that DVC did not come through with."""
    parent = open_parent(PARAMS, "parent")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    stage(monkeypatch, "pairs", "pairs", None, PARAMS)
    if written:
        write_lock(locked_folder, **{"p1.dir": "p2.dir"})
    close_parent(parent, PARAMS, "FAILED", reached)
    sync()
    tags = runs()["pairs"].data.tags
    assert ("dvc.lock_hash" in tags) == known
    assert tags.get("dvc.out.outputs/pairs") == (("p2.dir" if written else "p1.dir") if known else None)


def test_two_stages_that_start_at_once_record_a_cached_stage_once(
    locked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finds that `pairs`, which both are made from, has no run yet."""
    parent = open_parent(PARAMS, "parent")
    entries = dvc_lock.read()

    def slow() -> dict[str, dvc_lock.Entry]:
        time.sleep(0.3)
        return entries

    monkeypatch.setattr(cached_stages.dvc_lock, "read", slow)
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(cached_stages.settle(parent, PARAMS, ["pairs"])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [[], ["pairs"]]


def test_nothing_is_guessed_of_what_is_written_after_the_last_stage(
    locked_folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By DVC, or by a checkout of another result: under a plain `dvc repro` nobody can know."""
    monkeypatch.setenv("SPO_PARENT_RUN", open_parent(PARAMS, "parent").key)
    stage(monkeypatch, "report", "report", None, PARAMS)
    write_lock(locked_folder, r1="r2")
    open_parent(PARAMS, "next")
    sync()
    assert "dvc.lock_hash" not in runs()["report"].data.tags


def test_a_stage_that_logs_no_run_is_cached_if_its_entry_is_as_before(locked_folder: Path, runs: Any) -> None:
    parent = open_parent(PARAMS, "parent")
    write_lock(
        locked_folder, o1="o2", **{"p1.dir": "p2.dir"}
    )  # `sh other.sh` ran; outputs/pairs were restored
    assert close_parent(parent, PARAMS, "FINISHED", ("pairs", "other")) == ["pairs"]
    parent = open_parent(PARAMS, "next")
    assert close_parent(parent, PARAMS, "FINISHED", ("pairs", "other")) == ["pairs", "other"]


def test_a_lock_is_recorded_when_every_stage_of_it_has_a_run(
    locked_folder: Path, runs: Any, fresh_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known() -> bool:
        assert sync()[1] == 0
        return is_recorded("tiny")

    assert not known()
    parent = open_parent(PARAMS, "parent")
    monkeypatch.setenv("SPO_PARENT_RUN", parent.key)
    stage(monkeypatch, "pairs", "pairs", None, PARAMS)
    assert not known()
    close_parent(parent, PARAMS, "FINISHED", dvc_lock.read())
    assert known()
    write_lock(locked_folder, r1="r2")
    assert not known(), "another result, e.g. pulled"
    write_lock(locked_folder)
    assert known()
    shutil.copy(fresh_store, locked_folder / "other.db")
    assert not is_recorded("tiny", f"sqlite:///{locked_folder / 'other.db'}"), "another server"
    assert is_recorded("tiny", "http://127.0.0.1:9"), "it cannot be asked"
    (locked_folder / "dvc.lock").unlink()
    assert known(), "nothing to record"


def test_experiments_in_dvcs_temporary_folders_log_to_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (".dvc/tmp/exps/standalone/tmp1", ".dvc/tmp/exps/tmp2"):
        (tmp_path / part).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / part)
        assert home() == tmp_path
        assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path
