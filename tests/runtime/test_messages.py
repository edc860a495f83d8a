"""One line and an exit code for each failure; what is published names no path of the machine.

75 is for what may pass by itself, 2 for a mistake; a flow gets it although DVC is in between.
"""

from __future__ import annotations

import socket
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spo import cli
from spo.commands import arguments
from spo.runtime import messages, processes
from spo.runtime.messages import (
    EXIT_FILE,
    MISTAKE,
    TRANSIENT,
    TransientError,
    exit_code,
    public,
)


def wrapped(cause: BaseException) -> BaseException:
    """Return the one-line error that our code makes of a library's."""
    try:
        try:
            raise cause
        except Exception as error:
            raise ValueError(f"cannot be loaded ({error})") from None
    except ValueError as error:
        return error


def answer(status: int) -> BaseException:
    error: Any = RuntimeError("the server says no")
    error.response = SimpleNamespace(status_code=status)
    return error


class OfflineModeIsEnabled(ConnectionError):
    """As huggingface_hub's."""


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (ConnectionRefusedError(), TRANSIENT),
        (TimeoutError("read timed out"), TRANSIENT),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), TRANSIENT),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), MISTAKE),
        (BlockingIOError(), TRANSIENT),
        (TransientError("already runs"), TRANSIENT),
        (answer(503), TRANSIENT),
        (answer(404), MISTAKE),
        (urllib.error.HTTPError("http://x", 429, "slow down", {}, None), TRANSIENT),
        (OfflineModeIsEnabled("offline"), MISTAKE),
        (BrokenPipeError(), MISTAKE),
        (FileNotFoundError("no such file"), MISTAKE),
        (ValueError("params.yaml: unknown key"), MISTAKE),
    ],
)
def test_the_cause_decides_the_exit_code(cause: BaseException, code: int) -> None:
    assert exit_code(cause) == exit_code(wrapped(cause)) == code


@pytest.mark.parametrize("error", [TransientError("a server is away"), ValueError("a mistake")])
def test_the_command_line_ends_with_it_and_leaves_it_for_a_flow(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: Any) -> None:
        raise error

    monkeypatch.setattr(arguments, "_run_preset", fail)
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    code = cli.main(["preset", "smoke"])
    assert code == exit_code(error) and (tmp_path / "code").read_text() == str(code)
    assert capsys.readouterr().err == f"spo: {error}\n"


def test_one_process_of_several_hands_it_to_the_launcher_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(messages.OURS, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    assert processes.report_to_launcher("a server is away", TRANSIENT)
    messages.leave_exit_code(TRANSIENT)
    assert not (tmp_path / "code").exists() and '"code": 75' in (tmp_path / "error").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])  # srun hands no error on
@pytest.mark.parametrize(("local", "said"), [("0", True), ("1", False)])
def test_under_another_launcher_one_process_a_machine_says_it(
    local: str,
    said: bool,
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchrun shows a table and ends with 1, whatever its processes ended with."""
    for name, value in {"RANK": f"1{local}", "LOCAL_RANK": local, "WORLD_SIZE": "12"}.items():
        monkeypatch.setenv(name, value)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    assert cli.main(["report"]) == 2
    several = "only pairs, preference, align, generate, score run in several processes"
    line = f"{several}; start this command by itself"
    assert (tmp_path / "code").read_text() == "2"
    assert launcher == "srun" or line in (tmp_path / "error").read_text()
    assert capsys.readouterr().err == (f"spo: {line}\n" if said else "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/models/my sd", "my sd"),
        ("~/models/sd", "sd"),
        ("../../home/alice/sd", "sd"),
        ("sqlite:////home/alice/mlflow.db", "sqlite:///mlflow.db"),
        ("file:///home/alice/x.txt", "file://x.txt"),
        ("file:/home/alice/x.txt", "file:x.txt"),
        ("FileNotFoundError: /home/alice/p.yaml: no such file", "FileNotFoundError: p.yaml: no such file"),
        (
            "- base model: /home/alice/sd (family)\n- pairs: '/home/alice/p'",
            "- base model: sd (family)\n- pairs: 'p'",
        ),
        ("postgresql://alice:word@host/db", "postgresql://***@host/db"),
    ],
)
def test_of_a_path_outside_the_project_the_last_component_stays(text: str, expected: str) -> None:
    assert public(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "data/base",
        "OWNER/NAME@0123",
        "hf://datasets/OWNER/NAME@0123/a/b.csv",
        "https://host/a/b?c=d/e",
        "s3://bucket/a/b",
        "git@host:owner/name.git",
        "red and/or blue, 1/2",
        "<b>bold</b>",
        "![](samples/0.png)",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert public(text) == text


def test_a_path_inside_the_project_becomes_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = {"a": [str(tmp_path / "data/base")], "b": f"{tmp_path}/x: damaged", "c": 3}
    assert public(value) == {"a": ["data/base"], "b": "x: damaged", "c": 3}
