"""What tracking costs a stage: the seconds that its calls take, and those that its thread computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

from spo.tracking import curve, delivery, records, runs


@dataclass
class Cost:
    """Seconds. An upper bound: some calls lie within others, and the thread computes beside the stage."""

    calls: float = 0.0  # start and end of runs, logging; the stage waits for them
    thread: float = 0.0  # of processor time

    @property
    def seconds(self) -> float:
        return self.calls + self.thread


@contextmanager
def measured() -> Iterator[Cost]:
    """Counts while it is open."""
    cost = Cost()
    calls = [
        *((records.Run, n) for n in ("add", "collect", "log_artifact")),
        (curve.Curve, "log"),
        (runs, "_start"),
        *((delivery.Delivery, n) for n in ("__init__", "finish")),
    ]
    with ExitStack() as stack:
        for owner, name in calls:
            stack.enter_context(patch.object(owner, name, _called(getattr(owner, name), cost)))
        work = _computed(delivery.Delivery._work, cost)
        stack.enter_context(patch.object(delivery.Delivery, "_work", work))
        yield cost


def _called(function: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    """Seconds of the clock, where the stage's own thread calls."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            if threading.current_thread() is threading.main_thread():
                cost.calls += time.perf_counter() - began

    return call


def _computed(function: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            cost.thread += time.thread_time() - began

    return call
