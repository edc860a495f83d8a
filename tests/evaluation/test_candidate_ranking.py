"""Correlation of scores with the truth within the candidates of one step."""

import pytest
import torch

from spo.evaluation.candidate_ranking import within_correlation


def test_by_hand() -> None:
    scores = torch.tensor([[1.0, 10.0], [2.0, 12.0], [3.0, 14.0]])
    truth = torch.tensor([[0.1, 0.9], [0.2, 0.7], [0.3, 0.5]])
    # deviations: -1, 0, 1 and -2, 0, 2 against -.1, 0, .1 and .2, 0, -.2
    expected = (2 * 0.1 - 2 * 2 * 0.2) / ((2 + 8) * (0.02 + 0.08)) ** 0.5
    assert within_correlation(scores, truth) == pytest.approx(expected)


def test_what_differs_between_prompts_alone_does_not_count() -> None:
    between = torch.tensor([[5.0, -5.0], [5.0, -5.0]])
    assert within_correlation(between, torch.rand(2, 2)) == 0
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert within_correlation(scores + between, 3 * scores - 7 * between) == pytest.approx(1)
