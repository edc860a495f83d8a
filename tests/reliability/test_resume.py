"""A training stopped at any point of a checkpoint, and started again, ends with the same bits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backbone import Whole
from group import run_in
from tqdm import tqdm

from spo import config
from spo.training import checkpoint, distributed, loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Conditioning, UNetBatch

tqdm.set_lock(threading.RLock())  # its own is shared by all forks, and one that is killed may hold it
ITERATIONS, EVERY = 5, 2  # checkpoints 2, 4 and 5, of which the last two stay


class Line(Whole):
    """A linear model of eight numbers; the reference predicts nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.values = torch.nn.Parameter(torch.linspace(-1, 1, 8))

    def encode_prompts(self, prompts):
        return Conditioning({"text": torch.zeros(len(prompts), 1)})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        return torch.zeros_like(x_t) if reference else x_t * self.values.view(1, 8, 1, 1)

    def trainable_parameters(self):
        return [self.values]


class Noise:
    """Fits noise that belongs to the iteration."""

    guidance, iterations = 1.0, ITERATIONS

    def collect(self, backbone, iteration):
        x_t = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(iteration))
        batch = UNetBatch(
            x_t=x_t,
            timesteps=torch.zeros(4, dtype=torch.int64),
            conditioning=backbone.encode_prompts([""] * 4),
            weight=torch.ones(4),
        )
        return [[batch]], {}

    def loss(self, policy, reference, batch):
        return (policy - batch.x_t.roll(1, 1)).square().flatten(1).sum(1), {}


def fit(folder: Path) -> torch.Tensor:
    model = Line()
    settings = config.Optimizer(learning_rate=0.05, weight_decay=0.01)
    objective = Alignment("align.noise", model, Noise())
    options = {"checkpoint_every": EVERY, "on_metrics": lambda m, s: None}
    loop.fit(objective, settings, checkpoints=CheckpointStore(folder), **options)
    return model.values.detach()


@contextmanager
def noted(act: Callable[[int], None] = lambda number: None) -> Iterator[list[str]]:
    """The points of a training, in their order: batches, and what is written, flushed, renamed and removed.

    `act` is called after each with the number of points so far.
    """
    points: list[str] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            points.append(name)
            act(len(points))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for where, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (Noise, "collect")):
            patch.setattr(where, name, note(name, getattr(where, name)))
        patch.setattr(checkpoint._Hashed, "write", note("write", checkpoint._Hashed.write))
        yield points


def stopped_at(point: int, number: int, folder: Path, result: Path) -> int:
    """A training in a fork that gets the signal at a point; its wait status."""

    def act(count: int) -> None:
        if count == point:
            os.kill(os.getpid(), number)

    child = os.fork()
    if child == 0:
        try:
            with noted(act):
                torch.save(fit(folder), result)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[str]]:
    """The weights of a training that nothing happened to, and its points."""
    torch.set_num_threads(1)  # a thread pool does not live on in a fork
    with noted() as points:
        weights = fit(tmp_path_factory.mktemp("whole"))
    return weights, points


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("both")
    one, other = run_in(2, lambda: fit(folder))
    assert torch.equal(one, other)
    return one


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_anywhere_it_is_uninterrupted_bit_for_bit(whole, tmp_path: Path, number: int) -> None:
    weights, points = whole
    assert points.count("fsync") == 6 and points.count("replace") == 3, "a file and its folder each"
    assert {"collect", "write", "unlink"} <= set(points)
    writes = [i for i, name in enumerate(points) if name == "write"]
    # of the many writes of a file the first, one in the middle and the last
    some = {*range(len(points))} - {*writes} | {writes[0], writes[len(writes) // 2], writes[-1]}
    for i in sorted(some):
        folder, result = tmp_path / str(i), tmp_path / f"{i}.pt"
        status = stopped_at(i + 1, number, folder, result)
        if number == signal.SIGKILL:
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, points[i]
        step = (CheckpointStore(folder).latest() or (0, {}))[0]
        renamed = points[: i + 1].count("replace")
        assert step >= (0, 2, 4, 5)[renamed], f"a checkpoint was lost at point {i}, {points[i]}"
        assert torch.equal(fit(folder), weights), f"stopped at point {i}, {points[i]}"
        names = {path.name for path in folder.iterdir()}
        assert {"00000004.ckpt", "00000005.ckpt"} <= names, points[i]
        assert not [name for name in names if name.endswith(".partial")], "what the kill left is gone"


@pytest.mark.parametrize("victim", [0, 1])
def test_two_processes_of_which_one_is_killed_are_uninterrupted_bit_for_bit(
    whole, both, tmp_path: Path, victim: int
) -> None:
    """Between the first checkpoint and the end of the second; the launcher ends the other process.

    Only process 0 writes; process 1 is killed in an iteration behind the first checkpoint, its fourth batch.
    """
    points = whole[1]
    first, second = [i for i, name in enumerate(points) if name == "replace"][:2]
    write, collect = points.index("write", first), points.index("collect", first)
    kills = [3] if victim else [first, first + 1, collect, write, second - 1, second]
    for i in kills:
        folder = tmp_path / str(i)

        def act(count: int, i: int = i) -> None:
            if count == i + 1 and distributed.state().process_index == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        def killed(folder: Path = folder, act: Callable[[int], None] = act) -> torch.Tensor:
            with noted(act):
                return fit(folder)

        with pytest.raises(AssertionError, match="processes ended with"):
            run_in(2, killed)
        latest = CheckpointStore(folder).latest()
        assert latest is not None and latest[0] == (4 if i == second else 2)
        for weights in run_in(2, lambda folder=folder: fit(folder)):
            assert torch.equal(weights, both)
