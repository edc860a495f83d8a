"""Peak memory of a stage at its real size, counted without a GPU and without weights."""

from spo.estimate.stages import Peak, peak

__all__ = ["Peak", "peak"]
