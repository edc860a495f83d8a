"""The stand-in for a GPU counts bytes as by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils import checkpoint as torch_checkpoint

from spo.estimate import meta
from spo.training import placement

META = {"device": "meta"}


def test_bytes_are_those_at_the_peak() -> None:
    """Two vectors of 4,000 bytes at once, of three; and what the gradient of a product needs."""
    with meta.stand_in() as memory:
        x = torch.zeros(1000, **META)
        x = x + 1
        x = x + 1
        assert (memory.live, memory.peak) == (4000, 8000)
        memory.restart()
        assert memory.peak == 4000
        x.add_(1)
        x.view(10, 100).sum()  # a number of 4 bytes, in its place
        assert memory.peak == 4004
    with meta.stand_in() as memory:
        a = torch.ones(1000, requires_grad=True, **META)
        a.exp().sum().backward()
        # a; its exponential, which the gradient needs; one or both gradients; the sum and its gradient
        assert memory.peak in (3 * 4000 + 8, 4 * 4000 + 8)


def test_attention_keeps_its_inputs_and_its_output() -> None:
    """[1,2,8,4] in fp32 are 256 bytes: q, k, v, and the output; no matrix of 8 x 8 weights, but a sum [1,2,8]
    in fp32 and three numbers of 64 bits, as of flash attention.
    """
    with meta.stand_in() as memory:
        q, k, v = (torch.zeros(1, 2, 8, 4, requires_grad=True, **META) for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
        assert memory.live == 4 * 256 + 64 + 24
        out.sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape


def test_what_is_moved_away_does_not_count_until_it_is_back() -> None:
    with meta.stand_in() as memory:
        module = torch.nn.Linear(10, 10, **META)
        assert memory.live == 440
        for place, live in (("cpu", 0), ("cpu", 0), ("meta", 440), ("meta", 440)):
            placement.move(module, place)
            assert memory.live == live
        with placement.on_device(module, "meta"):
            assert memory.live == 440
        assert memory.live == 0


def test_in_autocast_products_are_in_half_precision_and_norms_are_fp32() -> None:
    with meta.stand_in() as memory:
        layer, norm = torch.nn.Linear(10, 10, bias=False, **META), torch.nn.LayerNorm(10, **META)
        x = torch.zeros(5, 10, **META)
        before = memory.live
        with torch.autocast("meta", torch.float16):
            first, second = layer(x), layer(x)
            assert first.dtype == torch.float16 and norm(first).dtype == torch.float32
        # twice x in fp16, which the gradient of the weights needs, and the output
        assert memory.live - before == 2 * (100 + 100)
        assert second.requires_grad
        with torch.autocast("meta", torch.float16, enabled=False):
            assert layer(x).dtype == torch.float32


def test_recomputed_activations_are_in_the_precision_of_autocast() -> None:
    with meta.stand_in():
        layer = torch.nn.Conv2d(3, 3, 1, **META)
        x = torch.zeros(1, 3, 4, 4, requires_grad=True, **META)
        with torch.autocast("meta", torch.float16):
            out = torch_checkpoint.checkpoint(layer, x, use_reentrant=False)
        out.float().sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_flops_are_those_of_products_convolutions_and_attention() -> None:
    """Of [5,10] x [10,10]: 1,000 and as many for the gradient of the weights; attention of 8 tokens with 4
    channels in 2 heads has two products of 8 * 8 * 4.
    """
    with meta.stand_in() as counter:
        torch.nn.Linear(10, 10, bias=False, **META)(torch.zeros(5, 10, **META)).sum().backward()
        assert counter.flops == 2 * 1000
        counter.restart()
        q = torch.zeros(1, 2, 8, 4, **META)
        F.scaled_dot_product_attention(q, q, q)
        assert counter.flops == 2 * 2 * 2 * 8 * 8 * 4


def test_values_that_are_read_are_ones() -> None:
    with meta.stand_in():
        x = torch.zeros(3, **META)
        assert x.sum().item() == 1.0 and x.tolist() == [1.0, 1.0, 1.0] and bool(x.isfinite().all())
        assert len(x[torch.zeros(3, dtype=torch.bool, **META)]) == 3


def test_outside_all_is_as_it_was() -> None:
    before = (torch.autocast, torch.amp.autocast, F.scaled_dot_product_attention, placement.move)
    with pytest.raises(ValueError), meta.stand_in():
        raise ValueError
    assert before == (torch.autocast, torch.amp.autocast, F.scaled_dot_product_attention, placement.move)
