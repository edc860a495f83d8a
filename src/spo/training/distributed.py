"""Several processes as one: the rank of this one, its shard of the work, sums and gathers over all.

With one process all functions are identities. The group of processes is accelerate's,
however they were started (`processes` in params.yaml, `accelerate launch`, `torchrun`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from spo.runtime.signals import COLLECTIVE
from spo.types import Conditioning

if TYPE_CHECKING:
    from accelerate import PartialState

S = TypeVar("S", bound=Any)
T = TypeVar("T")


def state() -> PartialState:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # without this flag accelerate joins no processes on the CPU
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu, timeout=COLLECTIVE)


def device() -> str:
    """Return the accelerator of this process, or the CPU."""
    return str(state().device)


def count() -> int:
    return state().num_processes


def is_main_process() -> bool:
    """Whether this one writes, tracks and shows."""
    return state().is_main_process


def shard(items: S) -> S:
    """Return this process's part of a sequence or tensor: contiguous, sizes differ by one at most."""
    n, rank, size = count(), state().process_index, len(items)
    return items[size * rank // n : size * (rank + 1) // n]


def check_shards(size: int, key: str) -> None:
    """
    Raises:
        ValueError: some process would have nothing to do; `key` names the number in params.yaml.
    """
    if size < count():
        raise ValueError(f"{key}: {size} is less than the {count()} processes; raise it, or use fewer")


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if count() == 1:
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether it is true in any process."""
    return flag if count() == 1 else bool(all_reduce_sum(torch.tensor(int(flag), device=state().device)))


def broadcast_int(number: int) -> int:
    """Return the number that the main process has."""
    if count() == 1:
        return number
    return int(all_reduce_sum(torch.tensor(number if is_main_process() else 0, device=state().device)))


def gather(rows: Tensor) -> Tensor:
    """Return the rows [n,...] of all processes in the order of their ranks; n may differ."""
    if count() == 1:
        return rows
    plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count())]
    torch.distributed.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    most = max(int(s) for s in sizes)
    padded = torch.zeros(most, *plain.shape[1:], dtype=plain.dtype, device=plain.device)
    padded[: len(plain)] = plain
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([p[: int(s)] for p, s in zip(parts, sizes, strict=True)]).to(rows.dtype)


def gather_conditioning(conditioning: Conditioning) -> Conditioning:
    if count() == 1:
        return conditioning
    return Conditioning({name: gather(value) for name, value in sorted(conditioning.tensors.items())})


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Replace every gradient by its sum over processes, in one flat tensor; return them, zeros where none."""
    if count() > 1:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = all_reduce_sum(torch.cat([g.flatten() for g in gradients]))
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]


def map_round_robin(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
    """Yield function(item) of each item in order: with n processes each computes every n-th, all get all.

    The items are the same whatever n is, so the results are too.
    """
    from accelerate.utils import gather_object

    n, rank = count(), state().process_index
    for start in range(0, len(items), n):
        results = [function(item) for item in items[start : start + n][rank : rank + 1]]
        yield from results if n == 1 else gather_object(results)
