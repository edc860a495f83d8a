"""What processes do for each other outside a collective, and lists that they share."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from group import run_in

from spo.rewards import scorer
from spo.runtime.messages import LostProcessError, TransientError
from spo.training import distributed
from spo.validation import scoring


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(distributed.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(distributed.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_who_waits_sees_what_is_ready_within_a_second(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    distributed.wait_for(lambda: clock.now >= 10, tmp_path, "the others work")
    assert 10 <= clock.now < 11


def test_a_process_waits_without_limit_for_work_in_progress(tmp_path, monkeypatch) -> None:
    """A day, in which a file grows every 20 minutes."""
    clock, work = Clock(monkeypatch), tmp_path / "shards/.00000.f16.partial"
    work.parent.mkdir()

    def ready() -> bool:
        work.write_bytes(bytes(int(clock.now / 1200)))
        return clock.now > 24 * 3600

    monkeypatch.setattr(distributed, "POLL", 20.0)
    distributed.wait_for(ready, tmp_path, "the others work")


def test_work_that_stands_still_for_half_an_hour_is_one_line(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    (tmp_path / "progress").touch()
    monkeypatch.setattr(distributed, "POLL", 20.0)
    with pytest.raises(TransientError, match="no change for 30 min while the others work; try again"):
        distributed.wait_for(lambda: False, tmp_path, "the others work")
    assert math.isclose(clock.now, 1800, abs_tol=60)


def test_a_collective_that_breaks_is_transient_and_memory_that_runs_out_is_not() -> None:
    closed = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    with pytest.raises(LostProcessError, match=r"another of the 1 processes broke \(\[/gloo.*to resume"):
        with distributed._collective():
            raise closed
    with pytest.raises(torch.OutOfMemoryError), distributed._collective():
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("timed out"), TransientError, "not all 2 processes joined at node-a:.*: timed out"),
        (ValueError("no MASTER_PORT"), ValueError, "environment of the launcher .RANK.*: no MASTER_PORT"),
    ],
)
def test_processes_that_do_not_join_are_one_line(monkeypatch, error, kind, message) -> None:
    def refuse(*arguments, **options) -> None:
        raise error

    monkeypatch.setattr(accelerate, "PartialState", refuse)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node-a"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=message) as caught:
        distributed.state()
    assert type(caught.value) is kind


def test_no_collective_waits_longer_than_half_an_hour(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(accelerate, "PartialState", lambda *_, timeout: given.append(timeout))
    distributed.state()
    assert given == [timedelta(minutes=30)]


class Counting:
    """A scorer: 10 times the image plus the length of the prompt."""

    name = "counting"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, images, prompts) -> list[float]:
        self.batches.append(len(images))
        return [10.0 * i + len(p) for i, p in zip(images, prompts, strict=True)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_process_scores_every_nth_batch_and_all_have_all_scores(n: int) -> None:
    images, prompts = list(range(9)), [("p" * (i % 4)) for i in range(9)]

    def body() -> dict:
        scorer = Counting()
        scores = scoring._shared(scorer, images, prompts, 2)
        return {"scores": scores, "batches": scorer.batches, "none": scoring._shared(scorer, [], [], 2)}

    results = run_in(n, body)
    sizes = [2, 2, 2, 2, 1]
    assert [r["batches"] for r in results] == [sizes[rank::n] for rank in range(n)]
    expected = [0.0, 11.0, 22.0, 33.0, 40.0, 51.0, 62.0, 73.0, 80.0]
    assert [r["scores"] for r in results] == [expected] * n and results[0]["none"] == []


def test_a_prompt_for_each_image() -> None:
    with pytest.raises(ValueError, match="counting: 2 images, but 3 prompts"):
        scoring._shared(Counting(), [1, 2], ["a", "b", "c"], 2)


def test_a_scorer_waits_for_no_other_process() -> None:
    """One process alone scores: there is no collective that the other would have to enter."""

    class Doubled(scorer.BatchedScorer):
        name = "x"

        def load(self, settings) -> None:
            """It has no files."""

        def score_batch(self, images, prompts) -> torch.Tensor:
            return torch.tensor(images) * 2.0

    def body() -> list[float]:
        if not distributed.is_main_process():
            return []
        return Doubled(SimpleNamespace(image_size=1), batch_size=2).score(list(range(5)), ["p"] * 5)

    assert run_in(2, body) == [[0.0, 2.0, 4.0, 6.0, 8.0], []]


def test_scorers_import_no_process_group() -> None:
    folder = Path(scorer.__file__).parent
    assert [p.name for p in folder.glob("*.py") if "distributed" in p.read_text(encoding="utf-8")] == []
