"""The counter of floating-point operations knows the attention of CPUs."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work import ATTENTION


def test_attention_counts_two_products_and_its_gradient_five() -> None:
    """A product of [5,8] and [8,7] takes 2 * 5 * 8 * 7 operations; there are 2 * 3 of each."""
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as forward:
        attended = scaled_dot_product_attention(query, key, value)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as backward:
        attended.sum().backward()
    product = 2 * 3 * 2 * 5 * 8 * 7
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product
