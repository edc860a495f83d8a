"""A project in any folder has its runs in that folder's own mlflow.db."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from spo.tracking.store import Store, sqlite_file, sqlite_uri, tracking_uri

NAMES = [
    "plain",
    "a b",
    "a?b",
    "a#b",
    "a%41b",
    "smörgås",
    "a'b",
    'a"b',
    "a;b",
    "a?uri=true",
    "a%3Fb?c",
    "file:a",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_s_uri_names_that_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "mlflow.db"
    assert sqlite_file(sqlite_uri(path)) == path


def test_uris_of_users_are_read_as_sqlalchemy_reads_them(tmp_path: Path) -> None:
    assert sqlite_file("sqlite:////a%41/b.db?timeout=5") == Path("/a%41/b.db")
    assert sqlite_file("sqlite:///b.db") == Path.cwd() / "b.db"
    assert sqlite_file("http://127.0.0.1:5000") is None


def test_a_run_lands_in_the_folder_s_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "a b?c#d%41smörgås'\"; :e"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "")  # given back after the test
    store = Store(tracking_uri())
    run = store.start_run("scenes", "prompts", {}, {"seed": "0"})
    (project / "a.txt").write_text("a")
    store.connect().log_artifact(run, "a.txt", "files")
    assert [p.name for p in tmp_path.iterdir()] == [project.name]
    made = {"mlflow.db", "mlflow.db.lock", "mlartifacts", "a.txt"}
    assert {p.name for p in project.iterdir()} == made
    with closing(sqlite3.connect(project / "mlflow.db")) as tables:
        assert tables.execute("select run_uuid from runs").fetchall() == [(run,)]
    assert len(list(project.glob("mlartifacts/*/artifacts/files/a.txt"))) == 1
