"""Use torch's meta device instead of a GPU: tensors have shapes and no values; bytes and FLOPs are counted.

Operators' workspaces (cuDNN), the allocator's fragmentation and the CUDA context are not counted. Attention
is flash attention, which stores q, k, v and its output for the backward pass.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

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


class Counter(Reads):
    """Bytes of the tensors on the device, now and at the peak, and FLOPs; both since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.peak, self.flops = self.live, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == DEVICE:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

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


class _Autocast(TorchFunctionMode):
    """torch.autocast, which does not know the meta device: products in `dtype`, norms and softmax in fp32."""

    PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm)
    NORMS = (F.layer_norm, F.group_norm, F.softmax, torch.softmax)
    entered: ClassVar[list[torch.dtype]] = []  # read by torch's checkpoint, which enters it again

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> None:
        super().__init__()
        self.dtype = dtype if enabled and device_type == DEVICE.type else None

    def __enter__(self) -> Any:
        if self.dtype:
            self.entered.append(self.dtype)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.dtype:
            self.entered.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype and func in (*self.PRODUCTS, *self.NORMS):
            dtype = self.dtype if func in self.PRODUCTS else torch.float32
            args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs))
        return func(*args, **kwargs)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def stand_in() -> Iterator[Counter]:
    """Within it the meta device acts as a GPU, and its tensors and operators are counted."""
    counter, entered = Counter(), _Autocast.entered
    with (
        mock.patch.multiple(
            torch,
            autocast=_Autocast,
            is_autocast_enabled=lambda kind="cuda": kind == DEVICE.type and bool(entered),
            get_autocast_dtype=lambda kind: entered[-1] if entered else torch.float32,
        ),
        mock.patch.multiple(torch.amp, autocast=_Autocast, is_autocast_available=lambda kind: True),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(placement, "move", counter.move),
        counter,
    ):
        yield counter
