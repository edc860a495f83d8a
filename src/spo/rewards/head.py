"""The linear head that LAION's aesthetic predictor and ImageReward share."""

from __future__ import annotations

from torch import nn


def linear_head(dimension: int) -> nn.Sequential:
    """A network D-1024-128-64-16-1 without activations; its dropout acts in training only."""
    return nn.Sequential(
        nn.Linear(dimension, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
