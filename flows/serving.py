"""The options with which a flow of flows/ is served on a schedule, checked before anything starts."""

from __future__ import annotations

import argparse
import asyncio
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from spo.runtime.messages import redact


def add_options(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--serve", action="store_true", help="run on request or on a schedule")
    parser.add_argument("--cron", help=f'when, in UTC, e.g. "{example}" (with --serve)')


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, example: str) -> None:
    """One line and exit 2 for a schedule that could never run."""
    from prefect.settings import PREFECT_API_URL

    if options.cron and not options.serve:
        parser.error("--cron needs --serve")
    if options.cron is not None:
        try:
            next_dates({"cron": options.cron})
        except ValueError as error:
            parser.error(f'--cron: {error}, e.g. "{example}"')
    if not options.serve:
        return
    url = PREFECT_API_URL.value()
    if url is None:  # a temporary server schedules nothing
        parser.error("--serve needs `prefect server start --host 127.0.0.1` and PREFECT_API_URL")
    if not answers(url):
        parser.error(f"no Prefect server answers at {redact(url)}; `prefect server start` starts one")


def answers(url: str) -> bool:
    """Whether a server answers, even if it refuses access."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def serve(flow: Any, name: str, cron: str | None, parameters: dict[str, Any]) -> None:
    """Run the flow on request or on a schedule, until stopped; prints when it will run next."""
    if cron is not None:
        dates = ", ".join(f"{date:%Y-%m-%d %H:%M %Z}" for date in next_dates({"cron": cron}))
        print(f"next runs: {dates}", flush=True)
    flow.serve(name=name, cron=cron, parameters=parameters)


def next_dates(schedule: Mapping[str, Any], count: int = 3) -> list[datetime]:
    """Return when a schedule of prefect.yaml fires next, by Prefect's own scheduler.

    Args:
        schedule: {cron, timezone}, {interval, ...} or {rrule, timezone}; without a time zone in UTC.

    Raises:
        ValueError: Prefect does not understand it, or it never fires, as on 31 February.
    """
    from prefect.server.schemas.schedules import SCHEDULE_TYPES
    from pydantic import TypeAdapter, ValidationError

    kind = next((kind for kind in ("cron", "rrule", "interval") if kind in schedule), "schedule")
    text = schedule.get(kind)
    try:
        known: Any = TypeAdapter(SCHEDULE_TYPES).validate_python({"timezone": "UTC", **schedule})
    except ValidationError:
        known = None
    if known is None or kind == "cron" and len(str(text).split()) != 5:
        raise ValueError(f"{text!r} is no {kind} expression")
    try:
        dates = asyncio.run(known.get_dates(count))
    except ValueError:  # what croniter raises where no day of the next 50 years fits
        dates = []
    if not dates:
        raise ValueError(f"{text!r} never fires: there is no such date")
    return [*dates]
