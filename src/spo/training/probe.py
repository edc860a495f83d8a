"""Seconds, FLOPs and live memory of a call, for estimates."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LONG = 3.0  # seconds of a call that is not repeated
Run = Callable[[int], Any]  # of a number of samples


class LiveBytes(TorchDispatchMode):
    """The bytes of tensors made within it that are alive, and the most there were.

    On the meta device nothing is computed, so that sizes that no machine holds can be counted. What an
    operator needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def live_bytes(run: Run, samples: int) -> int:
    """The most bytes that are alive at once while `run` works on `samples`.

    Attention counts as CPUs and GPUs compute it, without its matrix of weights.
    """
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _without_weights
    try:
        with LiveBytes() as counter:
            run(samples)
    finally:
        F.scaled_dot_product_attention = attention
    return counter.peak


def _without_weights(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """A result of attention's shape that keeps its three inputs for the backward pass."""
    return query * key.mean(-2, keepdim=True) * value.mean(-2, keepdim=True)


def flops(run: Run) -> int:
    """FLOPs of one sample, of matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run(1)
    return counter.get_total_flops()


def seconds(run: Run, samples: int, device: str) -> float:
    """Seconds of a sample: the shortest of two calls after one that warms up, or a call of LONG alone.

    In one thread on a CPU it is CPU time, in which other work on the machine does not count. Several threads
    sleep while they wait for each other, which CPU time leaves out: theirs is by the clock, of four calls.
    """
    cpu = torch.device(device).type == "cpu"
    alone = cpu and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    found = []
    for _ in range(5 if cpu and not alone else 3):
        started = clock()
        run(samples)
        if not cpu:
            torch.accelerator.synchronize()
        found.append(clock() - started)
        if found[-1] > LONG:
            break
    return min(found[1:] or found) / samples
