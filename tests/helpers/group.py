"""Several real processes (forks, joined by gloo), as a launcher would start them."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port


def run_in(n: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns in each of n processes. All that it imports should be imported before.

    As with a launcher, those that are left are ended when one fails: they could wait for it for half an hour.
    """
    torch.set_num_threads(1)  # a thread pool does not live on in a fork
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, n, port, Path(folder) / str(rank), function) for rank in range(n)]
        failed = _wait_for(children)
        assert not failed, f"processes ended with {failed}"
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(n)]


def exit_codes(n: int, function: Callable[[], int]) -> list[int]:
    """What `function` returns in each of n processes; as on several machines, nobody ends the others."""
    torch.set_num_threads(1)
    port = free_port()

    def body() -> None:
        os._exit(function())

    children = [_fork(rank, n, port, Path("never"), body) for rank in range(n)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def check_alike(one: dict, several: list[dict]) -> None:
    """Two processes have the metrics, counts and last gradients of one, and equal weights."""
    assert torch.equal(several[0]["weights"], several[1]["weights"])
    for other in several:
        assert other["counts"] == one["counts"]
        for ours, theirs in zip(other["metrics"], one["metrics"], strict=True):
            close = {name: pytest.approx(theirs[name], rel=1e-5) for name in ("loss", "gradient_norm")}
            # log-ratios and the like are small differences of large numbers
            assert ours == {k: pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in theirs.items()} | close
        error = (other["gradients"] - one["gradients"]).abs().max() / one["gradients"].abs().max()
        assert error < 1e-5


def _wait_for(children: Iterable[int]) -> list[int]:
    """The statuses of those that failed, the first first."""
    left, failed = set(children), list[int]()
    while left:
        ended = ((c, status) for c in left for pid, status in [os.waitpid(c, os.WNOHANG)] if pid)
        child, status = next(ended, (0, 0))  # not os.wait: it would take other tests' children too
        left.discard(child)
        if not child:
            time.sleep(0.005)
        if status:
            failed.append(status)
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return failed


def _fork(rank: int, n: int, port: int, result: Path, function: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        from accelerate import PartialState

        PartialState._reset_state()
        if n > 1:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            os.environ |= {k: str(v) for k, v in variables.items()} | {"OMP_NUM_THREADS": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from spo.training import distributed

        assert distributed.count() == n
        torch.save(function(), result)
        # the first process holds the store through which the others still join
        distributed.state().wait_for_everyone()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
