import math

import pytest
import torch

from spo.preference.loss import preference_loss


def test_by_hand() -> None:
    score_0, score_1 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    label_0 = torch.tensor([1.0, 0.0, 0.5])
    clear = math.log(1 + math.exp(-1))  # both clear pairs are a right guess by a margin of 1
    expected = [clear, clear, 0]
    assert preference_loss(score_0, score_1, label_0).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_tie_wants_equal_scores() -> None:
    scores = torch.tensor([0.7], requires_grad=True)
    loss = preference_loss(scores, torch.zeros(1), torch.tensor([0.5]))
    loss.backward()
    assert scores.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(0.7)).item() - 0.5)
    assert loss.item() > 0
