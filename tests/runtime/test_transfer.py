"""Copies to a device."""

from dataclasses import dataclass, field
from typing import Any

import torch

from spo.runtime.transfer import send


@dataclass
class Copied:
    """As much of a tensor as a copy asks for."""

    device: torch.device
    calls: list[Any] = field(default_factory=list)

    def pin_memory(self) -> "Copied":
        self.calls.append("pin_memory")
        return self

    def to(self, *arguments: Any, **options: Any) -> "Copied":
        self.calls.append((arguments, options))
        return self


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.arange(3.0)
    assert send(x, "cpu") is x
    assert send(x, torch.device("cpu"), torch.float16).tolist() == [0, 1, 2]


def test_to_cuda_it_goes_from_pinned_memory_without_blocking() -> None:
    x = Copied(torch.device("cpu"))
    assert send(x, "cuda", torch.float16) is x
    assert x.calls == ["pin_memory", (("cuda", torch.float16), {"non_blocking": True})]
    there = Copied(torch.device("cuda"))
    send(there, "cuda")
    assert "pin_memory" not in there.calls
