"""Compute and peak memory of a stage at its real size, counted without a GPU and without weights."""

from spo.estimate.count import Count
from spo.estimate.rate import rate
from spo.estimate.stages import count

__all__ = ["Count", "count", "rate"]
