"""The folder of a run between a stage and MLflow: nothing lost, nothing twice, no secrets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from spo.runtime.messages import one_line, redact
from spo.tracking import records
from spo.tracking.delivery import deliver, sync
from spo.tracking.records import Run, read_curve, runs_here
from spo.tracking.store import Store, tracking_uri


def new(name: str = "align-spo", parent: str = "", **content: Any) -> Run:
    return Run.create({"name": name, "experiment": "e", "params": {}, "tags": {}} | content, parent)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("see https://a.b/c?X-Amz-Signature=abc&size=2", "see https://a.b/c?X-Amz-Signature=***&size=2"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_redact_takes_out_passwords_only(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact({"a": [text, 1]}) == {"a": [clean, 1]}


def test_redact_reads_a_long_word_once() -> None:
    """Twice as long took four times as long: this one took minutes."""
    word = "a" * 500_000
    assert redact(word) == word and redact(f"{word}://me:pass@host") == f"{word}://***@host"
    assert redact("?key" * 100_000) == "?key" * 100_000
    assert one_line(ValueError("<" + word)).endswith("a")


def test_an_error_is_one_short_line_without_passwords() -> None:
    line = one_line(ValueError("no answer of http://me:pass@host\nmore " + "x" * 1000))
    assert line == "ValueError: no answer of http://***@host"
    assert len(one_line(ValueError("x" * 1000))) == 500


def test_a_curve_is_read_past_torn_lines_and_from_where_it_grew(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    path.write_text('{"time": 1, "step": 0, "loss": 1.0}\n{"time": 2, "st')
    rows, offset = read_curve(path)
    assert rows == [(1, 0, {"loss": 1.0})]
    with path.open("a") as file:
        file.write('ep": 1, "loss": 0.5}\nnull\n{"loss": 2}\n')
    assert read_curve(path, offset)[0] == [(2, 1, {"loss": 0.5})]
    assert read_curve(tmp_path / "nowhere") == ([], 0)


def test_what_is_added_joins_what_is_known(folder: Path) -> None:
    run = new(tags={"a": "1"})
    run.set_tags({"b": 2})
    run.log_metrics({"rows": 5})
    run.log_metrics({"rows": 6})
    run.add(hash="ab")
    content = run.read()
    assert content["tags"] == {"a": "1", "b": "2"} and content["metrics"] == {"rows": 6.0}
    assert content["hash"] == "ab" and content["version"] == 4


def killed(work: Callable[[], Any]) -> None:
    """Do what a process does before it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_run_whose_process_was_killed_is_closed(folder: Path, runs: Any) -> None:
    def work() -> None:
        parent = Run.create({"name": "repro", "experiment": "e", "params": {}, "tags": {}}, is_owned=False)
        child = new("align", parent.key)
        Path("curve.jsonl").write_text('{"time": 1, "step": 0, "loss": 1.0}\n', encoding="utf-8")
        child.follow(Path("curve.jsonl"), Path("samples"))

    killed(work)
    mine = new("mine")
    assert sync() == (3, 0)
    found = runs()
    assert found["align"].info.status == found["repro"].info.status == "KILLED"
    assert found["align"].data.metrics == {"loss": 1.0} and found["align"].info.end_time is not None
    assert mine.read()["status"] is None and found["mine"].info.status == "RUNNING"


def test_sync_ends_a_killed_run_of_which_all_was_delivered(folder: Path, runs: Any) -> None:
    def work() -> None:
        run = new("align")
        assert not deliver(Store(tracking_uri()), [run]) and not run.is_pending()

    killed(work)
    assert runs()["align"].info.status == "RUNNING"
    assert sync() == (1, 0)
    assert runs()["align"].info.status == "KILLED"


def test_a_damaged_run_is_named_once_and_holds_up_no_other(
    folder: Path, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = new("torn")
    (torn.path / "run.json").write_text("")
    new().end("FINISHED")
    assert sync() == (1, 0) and sync() == (0, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.json: truncated or invalid JSON" in line and "remove its folder" in line
    assert runs()["align-spo"].info.status == "FINISHED"


def test_a_lost_mark_delivers_again_without_a_trace(folder: Path, runs: Any) -> None:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "curve.jsonl").write_text('{"time": 1, "step": 1, "loss": 0.5}\n')
    run = new(status="FINISHED", end=records.now(), curve=str(folder / "curve.jsonl"), metrics={"rows": 5.0})
    for _ in range(2):
        assert not deliver(Store(uri), [run])
        run._write(run.read() | {"delivered": -1})
    client = Store(uri).connect()
    found = runs()["align-spo"]
    for name in ("loss", "rows"):
        assert len(client.get_metric_history(found.info.run_id, name)) == 1


def test_an_end_that_is_written_while_the_rest_is_sent_arrives(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run, linked = Store(f"sqlite:///{folder / 'mlflow.db'}"), new(), Store._linked

    def ends_meanwhile(self: Store, content: Any) -> Any:
        found = linked(self, content)
        run.end("FINISHED")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_linked", ends_meanwhile)
        store.deliver(run)
    assert run.is_pending() and runs()["align-spo"].info.status == "RUNNING"
    store.deliver(run)
    assert runs()["align-spo"].info.status == "FINISHED" and not run.is_pending()


def test_what_mlflow_refuses_is_said_and_the_rest_arrives(
    folder: Path, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(1, {"loss": 0.5, "no*name": 1.0}), (2, {"loss": 0.25})]
    lines = [json.dumps({"time": step, "step": step, **row}) for step, row in rows]
    (folder / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run = new(curve=str(folder / "curve.jsonl"))
    run.log_artifact(folder / "gone")
    run.end("FINISHED")
    for _ in range(2):
        assert sync() == (0, 1)
        (line,) = capsys.readouterr().err.splitlines()
        assert "metrics of align-spo" in line and "no*name" in line
    found = runs()["align-spo"]
    assert found.info.status == "FINISHED" and found.data.metrics == {"loss": 0.25}
    assert (run.path / "curve.jsonl").exists(), "what was refused stays"


def test_an_artifact_that_changed_is_not_sent_and_a_tag_of_its_run_says_so(folder: Path, runs: Any) -> None:
    run = new()
    for name in ("changed.csv", "removed.csv", "same.csv"):
        (folder / name).write_text("as it was")
        run.log_artifact(folder / name, "files")
    (folder / "changed.csv").write_text("another")
    (folder / "removed.csv").unlink()
    run.end("FINISHED")
    assert sync() == (1, 0) and sync() == (0, 0)
    found = runs()["align-spo"]
    assert found.info.status == "FINISHED"
    tagged = {name for name, text in found.data.tags.items() if "before it was sent to MLflow" in text}
    assert tagged == {"artifact.changed.csv", "artifact.removed.csv"}
    client = Store(f"sqlite:///{folder / 'mlflow.db'}").connect()
    assert [file.path for file in client.list_artifacts(found.info.run_id, "files")] == ["files/same.csv"]


def test_a_run_that_ends_while_its_process_is_looked_up_keeps_its_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new()

    def has_just_exited(pid: int) -> Any:
        run.end("FINISHED")
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", has_just_exited)
    run.close_if_dead()
    assert run.read()["status"] == "FINISHED"


def test_a_run_that_was_delivered_long_ago_leaves_this_machine(folder: Path, runs: Any) -> None:
    old = records.now() - int(1000 * records.STORED) - 1
    new("old", start=old, status="FINISHED", end=old)
    new(
        "waits",
        start=old,
        status="FINISHED",
        end=old,
        metrics={"no*name": 1.0},
    )
    assert (sync(), sync()) == ((1, 1), (0, 1))
    assert [run.read()["name"] for run in runs_here()] == ["waits"]
