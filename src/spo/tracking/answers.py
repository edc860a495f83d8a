"""What an answer of an MLflow server, or of a proxy before it, means, by its HTTP status."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

# of the statuses that are otherwise final: to log in (also at a proxy), too early, too often, locked, cut off
LATER = (401, 407, 408, 423, 425, 429, 499)
FINAL_5XX = (501, 507)  # the server cannot do it, or has no room for it
LOG_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
ANSWER, SLOWEST = 30.0, 100e3  # seconds for the answer to an upload, and the slowest line, in bytes a second


def status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, None if no answer came.

    MLflow's exceptions do not have it where the body is not MLflow's own, so it is read from the answer.
    """
    answer = _answer(error)
    if answer is not None:
        return int(answer.status_code)
    own = getattr(error, "get_http_status_code", None)  # of MLflow without a server
    return int(own()) if own else None


def is_final(error: BaseException) -> bool:
    """Whether the same request would get the same refusal again."""
    code = status(error) or 0
    return (400 <= code < 500 and code not in LATER) or code in FINAL_5XX


def is_page(error: BaseException) -> bool:
    """Whether the answer was none of MLflow's, though it has the status of success, or of a redirect."""
    return (status(error) or 500) < 400


def meaning(error: BaseException) -> str | None:
    """Say in one line what an answer means, where the message of the error does not say it; else None."""
    code = status(error)
    if code in (401, 407):
        return f"not authorised ({code}): {LOG_IN}"
    return f"not MLflow's answer ({code}), but a page of a proxy or a login" if is_page(error) else None


def seconds_for(path: Path) -> int:
    """Return the seconds that a server may take to answer an upload: it does so after the last byte."""
    return int(ANSWER + path.stat().st_size / SLOWEST)


def _answer(error: BaseException) -> Any:
    """The `requests.Response` of an error, or of the innermost call that had one."""
    from requests import Response

    own = getattr(error, "response", None)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    local = (value for frame in reversed(frames) for value in frame.f_locals.values())
    return next((value for value in (own, *local) if isinstance(value, Response)), None)
