"""Text for people and logs: one line, without passwords."""

from __future__ import annotations

import re
from typing import Any

SECRETS = (  # user:password@ of a URI, and secrets in its query
    (re.compile(r"(\w[\w+.-]*://)[^/\s]*@"), r"\1***@"),
    (re.compile(r"(?i)([?&][^=&\s]*(?:password|secret|token|signature|credential|key)=)[^&\s]+"), r"\1***"),
)


def redact(value: Any) -> Any:
    """The same text, list or mapping without the passwords of its URIs."""
    if isinstance(value, str):
        for pattern, replacement in SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return {k: redact(v) for k, v in value.items()}
    return [redact(v) for v in value] if isinstance(value, list | tuple) else value


def one_line(error: BaseException) -> str:
    """What went wrong, for a tag or a warning."""
    text = " ".join(str(error).split("\n")[0].split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:500]
