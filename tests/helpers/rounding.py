"""How far two results of one network may lie apart where nothing but the order of sums differs.

Processors, numbers of threads and sizes of batches have other orders.
"""

import torch


def bound(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """Return a share of the largest value.

    A sum of n products has about sqrt(n) roundings of eps, and those of all layers add up like lengths: the
    root of the summands on the way from input to output.
    """
    summands = sum(weight[0].numel() for weight in network.parameters() if weight.ndim > 1)
    return torch.finfo(dtype).eps * summands**0.5


def assert_same(one: torch.Tensor, other: torch.Tensor, network: torch.nn.Module) -> None:
    """Both are results of this network, or of one with the same layers."""
    difference = float((one - other).detach().abs().max())
    assert difference <= bound(network) * float(other.detach().abs().max())
