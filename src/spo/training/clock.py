"""Measure the seconds of a training across restarts; they are part of its state."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Starts when it is made; a resumed one counts on from the seconds of its checkpoint."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.training_seconds = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the body as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.training_seconds += time.monotonic() - began

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds, "training_seconds": self.training_seconds}

    def resume(self, state: dict[str, float]) -> None:
        """Add what `state` gave at the time of a checkpoint."""
        self._start -= state["seconds"]
        self.training_seconds += state["training_seconds"]
