"""The parameters and the code that a stage's run logs."""

import subprocess
from pathlib import Path

import pytest

from spo.stages import report
from spo.tracking.provenance import code, section

PARAMS = {
    "seed": 3,
    "preference": {"steps": 5, "step_condition": True, "noised": True},
    "latent_preference": {"steps": 7},
    "align": {"beta": 1, "spo": {"k": 4}, "lpo": {"k": 2}},
}


@pytest.mark.parametrize(
    ("stage", "item", "logged"),
    [
        (
            "preference",
            None,
            {"preference.steps": 5, "preference.step_condition": True, "preference.noised": True},
        ),
        ("preference", "latent", {"latent_preference.steps": 7}),
        (
            *("preference", "clean_only"),
            {"preference.steps": 5, "preference.step_condition": False, "preference.noised": False},
        ),
        ("align", "spo", {"align.beta": 1, "align.spo.k": 4}),
        ("inputs", None, {}),
    ],
)
def test_a_stage_logs_what_it_was_made_with(stage: str, item: str | None, logged: dict) -> None:
    assert section(PARAMS, stage, item) == {"seed": 3, **logged}
    assert PARAMS["preference"]["step_condition"] is True, "params are left as they were"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where git has no settings of a user or a machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def commit(folder: Path) -> str:
    (folder / "a").touch()
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "a"), (*name, "commit", "-qm", "a"), ("rev-parse", "HEAD")):
        done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_logged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = commit(place)
    assert code()["mlflow.source.git.commit"] == made and code()["git.dirty"] == "false"
    (place / "a").write_text("changed")
    assert code()["git.dirty"] == "true"
    assert report.commit() == made and capsys.readouterr().err == ""


def test_where_git_refuses_a_run_says_why_and_one_line_warns(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(place)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as of another user's clone
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert code()["git.refused"] == code()["git.refused"] == "detected dubious ownership in repository"
    assert "mlflow.source.git.commit" not in code()
    assert report.commit() == "detected dubious ownership in repository"
    (line,) = capsys.readouterr().err.splitlines()
    assert "no commit is recorded" in line and "dubious ownership" in line and str(place) in line


def test_an_archive_without_git_is_no_reason_to_warn(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code()["git.refused"] == report.commit() == "not in a git repository"
    assert capsys.readouterr().err == ""


def test_a_machine_without_git_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert "No such file" in code()["git.refused"]
    assert capsys.readouterr().err.count("no commit is recorded") == 1
