"""Messages for users and logs: one line, without passwords."""

from __future__ import annotations

import re
from typing import Any

SECRETS = (  # user:password@ of a URI, and secrets in its query
    (re.compile(r"(\w[\w+.-]*://)[^/\s]*@"), r"\1***@"),
    (re.compile(r"(?i)([?&][^=&\s]*(?:password|secret|token|signature|credential|key)=)[^&\s]+"), r"\1***"),
)
OBJECT = re.compile(r"<[\w.]+(?: object)?[^<>]* at 0x[0-9a-fA-F]+>")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}\b")


def redact(value: Any) -> Any:
    """Return the same text, list or mapping without the passwords of its URIs."""
    if isinstance(value, str):
        for pattern, replacement in SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {k: redact(v) for k, v in value.items()}
    return [redact(v) for v in value] if isinstance(value, list | tuple) else value


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
