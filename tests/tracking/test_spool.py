"""The file between a stage and MLflow: nothing lost, nothing twice, no secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spo.runtime.messages import one_line, redact
from spo.tracking import spool
from spo.tracking.records import BATCH, batches
from spo.tracking.spool import Spool, close_dead
from spo.tracking.store import Store


def new(uri: str = "x", name: str = "align-spo", **changes: Any) -> Spool:
    record = {"uri": uri, "experiment": "e", "name": name, "parent": None, "shared": False, "tags": {}}
    return Spool.create(**(record | changes))


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


def test_an_error_is_one_short_line_without_passwords() -> None:
    line = one_line(ValueError("no answer of http://me:pass@host\nmore " + "x" * 1000))
    assert line == "ValueError: no answer of http://***@host"
    assert len(one_line(ValueError("x" * 1000))) == 500


def test_records_come_back_in_order_past_a_torn_line(folder: Path) -> None:
    first = new()
    first.append("tags", tags={"a": "1"})
    with first.path.open("ab") as file:
        file.write(b'\n{"op": "metrics", "val')  # killed in the middle of a write
    first.append("end", status="FINISHED")
    assert [r["op"] for _, r in first.read()] == ["create", "tags", "end"]
    offsets = [offset for offset, _ in first.read()]
    assert [r["op"] for _, r in first.read(offsets[0])] == ["tags", "end"]


def test_what_any_store_has_is_not_left(folder: Path) -> None:
    one = new()
    one.append("tags", tags={"a": "1"})
    offsets = [offset for offset, _ in one.read()]
    assert one.left() == 2
    one.mark("server", "id", offsets[0])
    one.mark("other", "id2", 0)
    assert one.left() == 1
    assert one.state()["server"] == {"run_id": "id", "offset": offsets[0]}


def test_metrics_go_together_up_to_the_limit() -> None:
    metrics = [(i, {"op": "metrics", "metrics": {"a": 1.0, "b": 2.0}}) for i in range(700)]
    records = [(-1, {"op": "create"}), *metrics, (700, {"op": "tags"}), (701, {"op": "end"})]
    parts = list(batches(records))
    assert [len(part) for _, part in parts] == [1, BATCH // 2, 200, 1, 1]
    assert [end for end, _ in parts] == [-1, 499, 699, 700, 701]


def test_find_takes_keys_and_run_ids_and_nothing_else(folder: Path) -> None:
    known = new()
    assert Spool.find(known.key) == known
    adopted = Spool.find("0" * 32)
    assert adopted is not None and adopted.header()["run_id"] == "0" * 32
    assert Spool.find("nobody") is None


def test_a_run_whose_process_was_killed_is_closed(folder: Path) -> None:
    code = (
        "import os; from spo.tracking.spool import Spool\n"
        "p = Spool.create(uri='x', experiment='e', name='repro', parent=None, shared=True, tags={})\n"
        "Spool.create(uri='x', experiment='e', name='align', parent=p.key, shared=False, tags={})\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    mine = new(name="mine")
    close_dead()
    last = {s.header()["name"]: list(s.read())[-1][1] for s in spool.spools()}
    assert (last["align"]["op"], last["align"]["status"]) == ("end", "KILLED")
    assert (last["repro"]["child"], last["repro"]["status"]) == ("align", "KILLED")
    assert list(mine.read())[-1][1]["op"] == "create"


def test_a_lost_mark_delivers_again_without_a_trace(folder: Path, runs: Any) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    shared = new(store.name, shared=True)
    shared.append("metrics", step=1, metrics={"loss": 0.5})
    assert store.deliver(shared) == 2
    shared.path.with_suffix(".state").unlink()
    assert store.deliver(shared) == 2
    run = runs()["align-spo"]
    assert len(store.connect().get_metric_history(run.info.run_id, "loss")) == 1


def test_an_end_that_is_written_while_the_rest_is_sent_arrives(
    folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    one = new(store.name)
    one.append("tags", tags={"system.cpu": "2"})
    send = Store._send

    def ends_meanwhile(self: Store, spool: Spool, run_id: str, records: list[dict[str, Any]]) -> None:
        send(self, spool, run_id, records)
        if records[0]["op"] == "tags":
            one.append("end", status="FINISHED")

    monkeypatch.setattr(Store, "_send", ends_meanwhile)
    store.deliver(one)
    assert one.left() == 1
    store.deliver(one)
    assert runs()["align-spo"].info.status == "FINISHED"
    assert not one.path.exists()


def test_what_mlflow_refuses_is_set_aside_and_the_rest_arrives(
    folder: Path, runs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    one = new(store.name)
    one.append("metrics", step=1, metrics={"loss": 0.5})
    one.append("metrics", step=1, metrics={"no*name": 1.0})
    one.append("artifact", path=str(folder / "gone"), folder=None, sha256=None)
    one.append("metrics", step=2, metrics={"loss": 0.25})
    one.append("end", status="FINISHED")
    store.deliver(one)
    run = runs()["align-spo"]
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 0.25}
    refused = [json.loads(line) for line in one.path.with_suffix(".refused").read_text().splitlines()]
    assert [r["op"] for r in refused] == ["metrics", "artifact"]
    assert capsys.readouterr().err.count("refused a record") == 2
    assert not one.path.exists()
