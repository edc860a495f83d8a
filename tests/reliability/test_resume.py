"""The training loop killed again and again, also while it writes a checkpoint, ends with the same bits."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from fake_backbone import Whole
from group import run_in

from spo import config
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Conditioning, UNetBatch

ITERATIONS = 30
pytestmark = pytest.mark.smoke


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
    """Fits noise that belongs to the iteration; slow enough to be killed in the middle."""

    guidance, iterations = 1.0, ITERATIONS

    def collect(self, backbone, iteration):
        time.sleep(0.003)
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


def fit(folder: Path, slow_disk: bool = False) -> torch.Tensor:
    if slow_disk:  # so that kills fall into the writing of a checkpoint
        fsync = os.fsync
        os.fsync = lambda number: (time.sleep(0.004), fsync(number))[1]
    model = Line()
    settings = config.Optimizer(learning_rate=0.05, weight_decay=0.01)
    objective = Alignment("align.noise", model, Noise())
    options = {"checkpoint_every": 2, "on_metrics": lambda m, s: None}
    loop.fit(objective, settings, checkpoints=CheckpointStore(folder), **options)
    return model.values.detach()


def attempt(folder: Path, result: Path, number: int, wait: float) -> int:
    """One training in a process of its own, killed after `wait` seconds; its wait status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # no Ctrl-C before the child's `try`
    child = os.fork()
    if child == 0:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            torch.save(fit(folder, slow_disk=True), result)
            os._exit(0)
        except BaseException:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    time.sleep(wait)
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_random_is_uninterrupted_bit_for_bit(tmp_path: Path, number: int) -> None:
    torch.set_num_threads(1)  # a thread pool does not live on in a fork
    whole = fit(tmp_path / "whole")  # first: what is imported on first use takes seconds, in every fork
    draw, result = random.Random(int(number)), tmp_path / "result"

    def once(folder: Path, kills: int) -> int:
        return attempt(folder, result, number, draw.uniform(0.01, 0.12) + 0.01 * kills)

    kill_until_whole(tmp_path, once, most=200)
    assert torch.equal(torch.load(result), whole)


def kill_until_whole(root: Path, attempt: Callable[[Path, int], int], most: int) -> None:
    """Killed and started again until it ends by itself; anew where no kill came in time (a busy machine)."""
    for trial in range(20):
        store, reached, kills = CheckpointStore(root / f"trial{trial}"), 0, 0
        while attempt(root / f"trial{trial}", kills):
            kills += 1
            step = (store.latest() or (0, {}))[0]
            assert step >= reached, "a checkpoint was lost"
            reached = step
            assert kills < most
        if kills:
            return
    raise AssertionError("20 trainings ended before they could be killed")


def both(folder: Path) -> list[torch.Tensor]:
    """The same training in two processes joined by gloo; the weights of each."""
    return run_in(2, lambda: fit(folder, slow_disk=True))


def attempt_both(folder: Path, result: Path, number: int, wait: float, victims: Sequence[int]) -> int:
    """Two processes, of which `victims` get the signal after `wait` seconds; their parent's wait status."""
    child = os.fork()
    if child == 0:
        try:
            torch.save(both(folder), result)
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(wait)
    with contextlib.suppress(psutil.Error):
        workers = sorted(psutil.Process(child).children(), key=lambda p: p.pid)
        for worker in [workers[v] for v in victims if v < len(workers)]:
            worker.send_signal(number)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(
    ("number", "victims"), [(signal.SIGKILL, [0]), (signal.SIGKILL, [1]), (signal.SIGTERM, [0, 1])]
)
def test_two_processes_killed_at_random_are_uninterrupted_bit_for_bit(
    tmp_path: Path, number: int, victims: list[int]
) -> None:
    began = time.monotonic()
    whole = both(tmp_path / "whole")
    took = time.monotonic() - began
    assert torch.equal(whole[0], whole[1])
    draw, result = random.Random(10 * int(number) + victims[0]), tmp_path / "result"

    def once(folder: Path, kills: int) -> int:
        return attempt_both(folder, result, number, took * (draw.uniform(0.2, 0.7) + 0.05 * kills), victims)

    kill_until_whole(tmp_path, once, most=60)
    for weights in torch.load(result):
        assert torch.equal(weights, whole[0])
