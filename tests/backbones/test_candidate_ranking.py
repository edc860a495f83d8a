"""The ranking of candidates on a real backbone, by an oracle that agrees or disagrees."""

import pytest
import torch

from spo.evaluation import candidate_ranking as module
from spo.evaluation.candidate_ranking import candidate_ranking
from spo.types import Conditioning


class Brightness:
    """Scores images by their mean; the oracle of this test does so too, or says the opposite."""

    def encode_text(self, prompts):
        return Conditioning({"nothing": torch.zeros(len(prompts))})

    def score(self, candidates, text):
        return candidates.images.clamp(-1, 1).mean((1, 2, 3))


class Sign:
    def __init__(self, sign: float) -> None:
        self.model, self.sign = self, sign

    def perceive(self, images, captions=()):
        return self.sign * images.mean((1, 2, 3)).view(-1, 1).expand(-1, 4), []


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_step_of_the_rollout_is_measured(load, monkeypatch, sign: float) -> None:
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    backbone = load("sd")
    measured = candidate_ranking(
        backbone, Brightness(), Sign(sign), ["a circle", "a star", "a ring"], steps=4, guidance=2.0, seed=0
    )
    assert len(measured) == 4 and list(measured) == sorted(measured, reverse=True)
    assert list(measured.values()) == pytest.approx([sign] * 4, abs=1e-5)
