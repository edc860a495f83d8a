"""75 for what may pass by itself, 2 for a mistake; a flow learns it although DVC is in between."""

import socket
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spo import cli
from spo.runtime import exit_codes, launch
from spo.runtime.exit_codes import EXIT_FILE, MISTAKE, TRANSIENT, TransientError, exit_code


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

    monkeypatch.setattr(cli, "_run_preset", fail)
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    code = cli.main(["preset", "smoke"])
    assert code == exit_code(error) and (tmp_path / "code").read_text() == str(code)
    assert capsys.readouterr().err == f"spo: {error}\n"


def test_one_process_of_several_hands_it_to_the_launcher_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    assert launch.report_to_launcher("a server is away", TRANSIENT)
    exit_codes.leave_exit_code(TRANSIENT)
    assert not (tmp_path / "code").exists() and '"code": 75' in (tmp_path / "error").read_text()
