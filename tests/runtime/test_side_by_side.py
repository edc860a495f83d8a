"""The order in which tasks that depend on each other start, and what happens after a failure or a stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from spo.runtime import side_by_side

DIAMOND = {
    "first": (),
    "short": ("first",),
    "long": ("first", "a file"),
    "next": ("long",),
    "last": ("short", "next"),
}


def run(
    at_once: int, work: Callable[[str], bool], is_stopped: Callable[[], bool] = lambda: False
) -> tuple[side_by_side.Outcome, list[tuple[str, int]]]:
    """Return the outcome, and each task with its share, in the order of the starts."""
    started: list[tuple[str, int]] = []
    with ThreadPoolExecutor() as pool:

        def start(task: str, share: int) -> Future[bool]:
            started.append((task, share))
            return pool.submit(work, task)

        return side_by_side.run(DIAMOND, at_once, start, lambda f: f.result(), is_stopped), started


def test_one_at_a_time_follows_the_needs_and_the_longest_chain_goes_first() -> None:
    outcome, started = run(1, lambda task: True)
    assert [task for task, _ in started] == ["first", "long", "short", "next", "last"] == outcome.done
    assert {share for _, share in started} == {1} and outcome.failed == outcome.left == []


def test_independent_tasks_run_at_the_same_time() -> None:
    """`short` and `long` wait for each other: in turn they would not end."""
    both = threading.Barrier(2)

    def work(task: str) -> bool:
        if task in ("short", "long"):
            both.wait(timeout=300)
        return True

    outcome, started = run(3, work)
    assert sorted(outcome.done) == sorted(DIAMOND)
    assert started[:3] == [("first", 1), ("long", 2), ("short", 2)]
    assert started[-1] == ("last", 1)


def test_after_a_failure_those_that_run_end_and_none_starts() -> None:
    failed = threading.Event()

    def work(task: str) -> bool:
        if task == "long":
            failed.set()
            return False
        if task == "short":
            assert failed.wait(timeout=300)
        return True

    outcome, _ = run(2, work)
    assert (outcome.done, outcome.failed) == (["first", "short"], ["long"])
    assert sorted(outcome.left) == ["last", "next"]


def test_after_a_stop_none_starts() -> None:
    stopped = threading.Event()

    def work(task: str) -> bool:
        stopped.set()
        return True

    outcome, _ = run(2, work, stopped.is_set)
    assert outcome.done == ["first"] and outcome.failed == []
    assert sorted(outcome.left) == ["last", "long", "next", "short"]
