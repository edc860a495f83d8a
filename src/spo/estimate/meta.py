"""torch's meta device in the place of a GPU: tensors have shapes and no values, and their bytes are counted.

What an operator needs inside itself (cuDNN's workspaces), the allocator's fragmentation and the CUDA context
are not seen. Attention keeps q, k, v and its output for the backward pass, as flash attention does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers.modeling_utils
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from spo.training import placement

DEVICE = torch.device("meta")


class Reads(TorchDispatchMode):
    """Values that are read from the device are ones, and all rows of a mask are true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device == DEVICE for x in given)
        if name == "_local_scalar_dense" and on_device:
            return self.waited(torch.ones((), dtype=args[0].dtype).item())
        if name == "nonzero" and on_device:
            return self.waited(args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64))
        if name == "index" and on_device and any(_is_mask(i) for i in args[1]):
            every = [i.new_empty(len(i), dtype=torch.int64) if _is_mask(i) else i for i in args[1]]
            return self.waited(func(args[0], every))
        if name == "masked_select" and on_device:
            return self.waited(args[0].new_empty(args[0].numel()))
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or args[0].device)
            if on_device and target != DEVICE:
                kind = kwargs.get("dtype") or args[0].dtype
                return self.waited(torch.ones(args[0].shape, dtype=kind))
            if not on_device and target == DEVICE and not kwargs.get("non_blocking"):
                self.waited(None)
        if name == "copy_" and args[0].device != args[1].device:
            self.waited(None)
        return func(*args, **kwargs)

    def waited(self, result: Any) -> Any:
        """Called where Python would wait for the device, with what it gets."""
        return result


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


class Memory(Reads):
    """The bytes of tensors on the device: those that are alive, and the most there were since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._change(size)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def move(self, module: nn.Module, place: torch.device | str) -> None:
        """`placement.move`: the weights stay where they are, and count or do not count."""
        weights = {x.untyped_storage()._cdata: x for x in (*module.parameters(), *module.buffers())}
        size = sum(x.untyped_storage().nbytes() for x in weights.values())
        rests, goes = getattr(module, "_rests", False), torch.device(place).type == "cpu"
        if rests != goes:
            self._change(-size if goes else size)
        module._rests = goes  # type: ignore[assignment]


class _Attention(torch.autograd.Function):
    """Attention's output and gradients by their shapes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Autocast(TorchFunctionMode):
    """torch.autocast, which does not know the meta device: products in `dtype`, norms and softmax in fp32."""

    PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm)
    NORMS = (F.layer_norm, F.group_norm, F.softmax, torch.softmax)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._cast: dict[int, Tensor] = {}  # weights, once within the context, as autocast does

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif func in self.NORMS:
            args, kwargs = tree_map(lambda x: x.float() if _is_float(x) else x, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, x: Any) -> Any:
        if not _is_float(x) or x.dtype == self.dtype:
            return x
        if not (x.requires_grad and x.is_leaf):
            return x.to(self.dtype)
        if id(x) not in self._cast:
            self._cast[id(x)] = x.to(self.dtype)
        return self._cast[id(x)]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@contextmanager
def stand_in() -> Iterator[Memory]:
    """Within it the meta device behaves as a GPU does, and what lies on it is counted."""

    entered: list[_Autocast] = []

    @contextmanager
    def autocast(kind: str, dtype: Any = None, enabled: bool = True, **options: Any) -> Iterator[None]:
        if not enabled or kind != DEVICE.type:
            yield
            return
        entered.append(_Autocast(dtype))
        with entered[-1]:
            yield
        entered.pop()

    def recomputed(function: Any, *args: Any, **options: Any) -> Any:
        """torch's checkpoint, which enters autocast again in the backward pass."""
        if entered:
            dtype = entered[-1].dtype
            options["context_fn"] = lambda: (nullcontext(), _Autocast(dtype))
        return checkpoint(function, *args, **options)

    memory = Memory()
    with (
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda *args: False),
        mock.patch.object(
            F, "scaled_dot_product_attention", lambda q, k, v, *a, **o: _Attention.apply(q, k, v)
        ),
        mock.patch.object(placement, "move", memory.move),
        mock.patch.object(torch.utils.checkpoint, "checkpoint", recomputed),
        mock.patch.object(transformers.modeling_utils, "checkpoint", recomputed),
        memory,
    ):
        yield memory
