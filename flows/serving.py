"""The options by which a flow of flows/ stays and runs by the clock, checked before anything starts."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.request

from spo.runtime.messages import redact


def add_options(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("--serve", action="store_true", help="stay, and run when asked or by the clock")
    parser.add_argument("--cron", help=f'when, in UTC, e.g. "{example}" (with --serve)')


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, example: str) -> None:
    """One line and exit 2 for a schedule that could never run."""
    from prefect.settings import PREFECT_API_URL

    if options.cron and not options.serve:
        parser.error("--cron needs --serve")
    if options.cron is not None and not valid_cron(options.cron):
        parser.error(f'--cron {options.cron!r} is no cron expression, e.g. "{example}"')
    if not options.serve:
        return
    url = PREFECT_API_URL.value()
    if url is None:  # a temporary server schedules nothing
        parser.error("--serve needs `prefect server start --host 127.0.0.1` and PREFECT_API_URL")
    if not answers(url):
        parser.error(f"no Prefect server answers at {redact(url)}; `prefect server start` starts one")


def answers(url: str) -> bool:
    """Whether there is a server: one that refuses us is one."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def valid_cron(text: str) -> bool:
    """Five fields that Prefect's scheduler understands."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=text)
    except ValueError:
        return False
    return len(text.split()) == 5
