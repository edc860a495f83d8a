"""Messages for users and logs: one line, without passwords; what is published, without a machine's paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

SECRETS = (  # user:password@ of a URI, and secrets in its query
    (re.compile(r"(\w[\w+.-]*://)[^/\s]*@"), r"\1***@"),
    (re.compile(r"(?i)([?&][^=&\s]*(?:password|secret|token|signature|credential|key)=)[^&\s]+"), r"\1***"),
)
NAME = r"[^\s/'\"`,;:()\[\]{}<>|]+"  # of a file in a text
OUTSIDE = re.compile(  # the folders of an absolute path or one below ~ or ..; not the host of a URI
    r"(?:(?<=:///)|(?<=://)(?=/)|(?<=file:)(?=/(?!/))|(?<![\w:/.~-])~?(?=/)|(?<![\w/.])(?=\.\./))"
    rf"(?:\.\.)?/(?:{NAME}/)+(?={NAME})"
)
OBJECT = re.compile(r"<[\w.]+(?: object)?[^<>]* at 0x[0-9a-fA-F]+>")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}\b")


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
