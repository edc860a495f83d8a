"""How a preference model learns from labels (PickScore, arXiv 2305.01569, Eq. 1; also for the SPM)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def preference_loss(score_0: Tensor, score_1: Tensor, label_0: Tensor) -> Tensor:
    """Cross-entropy [B] of the labels and the softmax over two scores.

    Args:
        score_0: logits [B] of the first image; score_1 of the second.
        label_0: [B], 1, 0 or .5 (tie); log .5 is added to a tie's loss, so that its best value is 0.
    """
    difference = score_0 - score_1
    losses = -label_0 * F.logsigmoid(difference) - (1 - label_0) * F.logsigmoid(-difference)
    return losses + (label_0 == 0.5) * math.log(0.5)
