"""Messages of failed commands: one line without passwords, and an exit code.

From the exit code a flow or a scheduler decides whether to try again. Published text has no paths of this
machine either.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MISTAKE = 2  # in parameters or data: another attempt fails in the same way
TRANSIENT = os.EX_TEMPFAIL  # 75
STOPPED = 130  # by Ctrl-C or SIGTERM

OURS = "SPO_LAUNCHER"  # environment: the `spo` that launched this process
EXIT_FILE = "SPO_EXIT_FILE"  # environment: where `spo` leaves its exit code
BUSY = (429, 502, 503, 504)  # HTTP: too many requests, or a proxy that cannot reach its server

SECRETS = (  # user:password@ of a URI, and secrets in its query
    (re.compile(r"([\w+.-]://)[^/\s]*@"), r"\1***@"),
    (re.compile(r"(?i)([?&][^=?&\s]*(?:password|secret|token|signature|credential|key)=)[^&\s]+"), r"\1***"),
)
NAME = r"[^\s/'\"`,;:()\[\]{}<>|]+"  # of a file in a text
OUTSIDE = re.compile(  # the folders of an absolute path or one below ~ or ..; not the host of a URI
    r"(?:(?<=:///)|(?<=://)(?=/)|(?<=file:)(?=/(?!/))|(?<![\w:/.~-])~?(?=/)|(?<![\w/.])(?=\.\./))"
    rf"(?:\.\.)?/(?:{NAME}/)+(?={NAME})"
)
OBJECT = re.compile(r"<[\w.][^<>]* at 0x[0-9a-fA-F]+>")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}\b")


class TransientError(ValueError):
    """A failure that may pass by itself: another process holds a lock, a server does not answer."""


class LostProcessError(TransientError):
    """A collective failed because another process has ended; that process reports the reason."""


def exit_code(error: BaseException) -> int:
    """Return TRANSIENT where the network, a server or another process caused an error, else MISTAKE.

    By the types of all errors before it.
    """
    chain = list(causes(error))
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in chain):
        return MISTAKE  # a ConnectionError of huggingface_hub, but offline by HF_HUB_OFFLINE
    return TRANSIENT if any(_is_transient(cause) for cause in chain) else MISTAKE


def leave_exit_code(code: int, first: bool = False) -> None:
    """Write the code to the file that EXIT_FILE names: `dvc repro` and torchrun hide a stage's code.

    A process that `spo` itself launched does nothing: the `spo` above writes the code.

    Args:
        first: only if no other process has left one.
    """
    if (path := os.environ.get(EXIT_FILE)) and OURS not in os.environ:
        with suppress(OSError), open(path, "a" if first else "w", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(str(code))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and all that were being handled when it was raised, also under `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, BrokenPipeError):  # the program that reads our output has exited
        return False
    if isinstance(error, TransientError | ConnectionError | TimeoutError | BlockingIOError):
        return True
    response = getattr(error, "response", None)  # of requests and httpx; urllib has the code itself
    return getattr(response, "status_code", getattr(error, "code", None)) in BUSY


def redact(value: Any) -> Any:
    """Return the same text, list or mapping without the passwords of its URIs."""
    return _each_text(_without_passwords, value)


def public(value: Any) -> Any:
    """Return the same text, list or mapping without passwords and without paths of this machine.

    A path inside the project becomes relative to it; of one outside, the last component stays.
    """
    return _each_text(lambda text: _without_paths(_without_passwords(text)), value)


def _each_text(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: _each_text(change, v) for k, v in value.items()}
    return [_each_text(change, v) for v in value] if isinstance(value, list | tuple) else value


def _without_passwords(text: str) -> str:
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _without_paths(text: str) -> str:
    text = text.replace(os.path.join(os.getcwd(), ""), "") if os.getcwd() != "/" else text
    if text.startswith(("/", "~/", "../")) and "\n" not in text:  # all of it is a path, which may have spaces
        return os.path.basename(text.rstrip("/"))
    return OUTSIDE.sub("", text)


def first_line(error: BaseException, longest: int = 120) -> str:
    """Return the first line of an error's message, or its type if it has none.

    Without addresses in memory, so that it is the same in each run and on each machine.
    """
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ADDRESS.sub("...", OBJECT.sub("the data", text))[:longest]


def one_line(error: BaseException) -> str:
    """Return type and first line of an error without passwords, for a tag or a warning."""
    name, text = type(error).__name__, " ".join(first_line(error, 500).split())
    return redact(text if text == name else f"{name}: {text}")[:500]
