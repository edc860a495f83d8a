"""The seconds of a training that was stopped are those of all its processes."""

from types import SimpleNamespace

import pytest
from two_numbers import Numbers, Squares, run, settings

from spo.training import clock, loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.training.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets: the time is its one number."""
    time = [1000.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


class Slow(Squares):
    """Collecting the batch of an iteration takes 10 s."""

    def __init__(self, iterations: int, now: list[float]) -> None:
        super().__init__(iterations)
        self.now = now

    def collect(self, backbone, iteration):
        self.now[0] += 10
        return super().collect(backbone, iteration)


def part(now: list[float], folder, stop_at: int) -> tuple[dict, float]:
    """One process: 5 s until it trains, 3 s of each validation; stopped by Ctrl-C, or killed."""
    own = Clock()
    now[0] += 5

    def watch(iteration, metrics) -> bool:
        now[0] += 3
        return False

    def note(metrics, iteration) -> None:
        if iteration == stop_at:
            raise RuntimeError("power cut")

    objective = Alignment("align.squares", Numbers(), Slow(6, now))
    options = {"checkpoints": CheckpointStore(folder), "checkpoint_every": 2, "on_metrics": note}
    summary = loop.fit(objective, settings(), watch=watch, clock=own, **options)
    return summary, own.seconds


def test_a_resumed_training_took_the_seconds_of_all_its_parts(now, tmp_path) -> None:
    """Killed in the fifth iteration, which is lost: 5 + 3 + 4 x 13, then 5 + 2 x 13."""
    with pytest.raises(RuntimeError):
        part(now, tmp_path, stop_at=5)
    now[0] += 86_400  # the machine is off for a day
    summary, seconds = part(now, tmp_path, stop_at=0)
    assert summary["iterations"] == 6 and summary["training_seconds"] == 60
    assert seconds == 5 + 3 + 4 * 13 + 5 + 2 * 13
    now[0] += 100
    summary, seconds = part(now, tmp_path, stop_at=0)  # killed after the last iteration, before its results
    assert summary["training_seconds"] == 60 and seconds == 5 + 3 + 4 * 13 + 5 + 2 * 13 + 5


def test_without_a_clock_the_training_has_its_own(now) -> None:
    assert run(Numbers(), Slow(3, now))["training_seconds"] == 30
