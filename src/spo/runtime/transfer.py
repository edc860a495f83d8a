"""Copy tensors from host memory to a device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, without waiting for what the device computes.

    CUDA copies beside its computations only from pinned memory. On a CPU it is `tensor.to(device, dtype)`.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)
