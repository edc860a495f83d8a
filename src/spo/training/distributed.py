"""Several processes as one: the rank of this one, its shard of the work, sums and gathers over all.

With one process all functions are identities. The group of processes is accelerate's,
however they were started (`processes` in params.yaml, `accelerate launch`, `torchrun`, a scheduler).
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from spo.runtime import processes
from spo.runtime.messages import LostProcessError, TransientError, first_line
from spo.runtime.signals import COLLECTIVE

if TYPE_CHECKING:
    from accelerate import PartialState

STALLED = 1800.0  # seconds without a change after which a process stops waiting; a batch takes much less
POLL = 0.2  # seconds
S = TypeVar("S", bound=Any)
T = TypeVar("T")


def state() -> PartialState:
    """Return accelerate's state of the processes; the first call joins them.

    Raises:
        TransientError: some did not join within COLLECTIVE.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # without this flag accelerate joins no processes on the CPU
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if not processes.is_started_by_others():
        return PartialState(cpu, timeout=COLLECTIVE)
    try:
        return PartialState(cpu, timeout=COLLECTIVE)
    except ValueError as error:  # a variable that is missing or no number
        names = "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
        raise ValueError(f"environment of the launcher ({names}): {first_line(error)}") from None
    except RuntimeError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        message = f"not all {os.environ['WORLD_SIZE']} processes joined at {where}: {first_line(error)}"
        raise TransientError(message) from None


@contextmanager
def _collective() -> Iterator[None]:
    """Run a collective operation.

    Raises:
        LostProcessError: another process has ended or stopped responding.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcessError(
            f"the connection to another of the {count()} processes broke ({first_line(error)}); "
            "start all of them again to resume from the last checkpoint"
        ) from None


def wait_for(ready: Callable[[], bool], folder: Path, what: str) -> None:
    """Wait for the work of other processes until `ready()`. Unlike a collective it may take any time.

    Args:
        folder: where the others write as they progress.
        what: the work, for the error.

    Raises:
        TransientError: for STALLED seconds nothing has changed in `folder`.
    """
    seen, changed, checked = -1.0, time.monotonic(), -math.inf
    while not ready():
        now = time.monotonic()
        if now - checked > STALLED / 100:
            newest, checked = _last_change(folder), now
            if newest != seen:
                seen, changed = newest, now
            elif now - changed > STALLED:
                raise TransientError(f"{folder}: no change for {STALLED / 60:g} min while {what}; try again")
        time.sleep(POLL)


def _last_change(folder: Path) -> float:
    """Return the newest time of a folder and all in it; of fewer files where one disappears meanwhile."""
    newest = 0.0
    with suppress(OSError):
        for path in (folder, *folder.rglob("*")):
            newest = max(newest, path.stat().st_mtime)
    return newest


def check_folder(folder: Path) -> None:
    """Check that all processes see the same folder: the main process writes a file there."""
    file = folder / f"node-{broadcast(secrets.randbits(31))}"
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    any_rank(False)  # written
    seen = gather(torch.tensor([file.exists()], device=state().device))
    if is_main_process():
        file.unlink()
    if not seen.all():
        raise ValueError(
            f"{Path.cwd()} of process 0 is not the folder of process {int(seen.int().argmin())}: "
            "start all nodes in one folder of a shared file system"
        )


def device() -> str:
    """Return the accelerator of this process, or the CPU."""
    return str(state().device)


def count() -> int:
    return state().num_processes


def is_main_process() -> bool:
    """Whether this process writes files, tracks the run and shows progress."""
    return state().is_main_process


def shard(items: S) -> S:
    """Return this process's part of a sequence or tensor: contiguous, sizes differ by one at most."""
    n, rank, size = count(), state().process_index, len(items)
    return items[size * rank // n : size * (rank + 1) // n]


def check_shards(size: int, key: str) -> None:
    """Refuse a number of items that leaves a process without any; `key` is its name in params.yaml."""
    if size < count():
        raise ValueError(f"{key}: {size} is less than the {count()} processes; raise it, or use fewer")


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if count() == 1:
        return value
    value = value.detach().clone()
    with _collective():
        torch.distributed.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether it is true in any process."""
    return flag if count() == 1 else bool(all_reduce_sum(torch.tensor(int(flag), device=state().device)))


def broadcast(value: T) -> T:
    """Return what the main process has, anything that pickle takes."""
    from accelerate.utils import broadcast_object_list

    if count() == 1:
        return value
    values = [value]
    with _collective():
        broadcast_object_list(values)
    return values[0]


def gather(rows: Tensor) -> Tensor:
    """Return the rows [n,...] of all processes in the order of their ranks; n may differ."""
    if count() == 1:
        return rows
    plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count())]
    with _collective():
        torch.distributed.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    most = max(int(s) for s in sizes)
    padded = torch.zeros(most, *plain.shape[1:], dtype=plain.dtype, device=plain.device)
    padded[: len(plain)] = plain
    parts = [torch.empty_like(padded) for _ in sizes]
    with _collective():
        torch.distributed.all_gather(parts, padded)
    return torch.cat([p[: int(s)] for p, s in zip(parts, sizes, strict=True)]).to(rows.dtype)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Replace every gradient by its sum over processes, in one flat tensor; return them.

    A parameter that has none in any process keeps none: the optimizer leaves it alone, as with one process.
    """
    if count() > 1:
        known = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
        anywhere = all_reduce_sum(known.int()).tolist()
        trained = [p for p, number in zip(parameters, anywhere, strict=True) if number]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        flat = torch.cat([g.flatten() for g in gradients])
        with _collective():
            torch.distributed.all_reduce(flat)  # in place: of a full fine-tune it is gigabytes
        for parameter, part in zip(trained, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)
    return [p.grad for p in parameters if p.grad is not None]


def map_round_robin(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield function(item) of each item in order: with n processes each computes every n-th, all get all.

    The items are the same whatever n is, so the results are too. No process waits longer for the others than
    one item takes.
    """
    from accelerate.utils import gather_object

    n, rank = count(), state().process_index
    for start in range(0, len(items), n):
        results = [function(item) for item in items[start : start + n][rank : rank + 1]]
        if n > 1:
            with _collective():
                results = gather_object(results)
        yield from results
