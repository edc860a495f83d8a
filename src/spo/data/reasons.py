"""Reasons why a file or a row cannot be read, identical in every run and on every machine."""

from __future__ import annotations

import re

_OBJECT = re.compile(r"<[\w.]+(?: object)?[^<>]* at 0x[0-9a-fA-F]+>")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}\b")


def first_line(error: BaseException, longest: int = 120) -> str:
    """The first line of an error's message, without memory addresses; its type if it has no message."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _ADDRESS.sub("...", _OBJECT.sub("the data", text))[:longest]
