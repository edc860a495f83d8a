"""Copies to a device. torch's fake tensors stand for those of a GPU."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spo.runtime.transfer import send


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.arange(3.0)
    assert send(x, "cpu") is x
    assert send(x, torch.device("cpu"), torch.float16).tolist() == [0, 1, 2]


def test_to_cuda_it_goes_from_pinned_memory_without_blocking(monkeypatch) -> None:
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    to = torch.Tensor.to

    def noted(x, *args, **options):
        copied.append(options)
        return to(x, *args, **options)

    with FakeTensorMode():
        x = torch.zeros(3)
        monkeypatch.setattr(torch.Tensor, "to", noted)
        y = send(x, "cuda", torch.float16)
        assert y.device.type == "cuda" and y.dtype == torch.float16
        assert pinned[0] is x and copied == [{"non_blocking": True}]
        send(y, "cuda")  # which is there already
    assert len(pinned) == 1
