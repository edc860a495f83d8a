"""A trained preference model as the reward model that scores SPO's candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.preference.model import StepAwarePreferenceModel, load_tokenizer, token_ids
from spo.types import Candidates, Conditioning


class ClipRewardModel:
    """A trained model and its tokenizer as a `types.RewardModel`: fp32, no gradients."""

    needs_images = True

    def __init__(self, model: StepAwarePreferenceModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        text = self.model.encode_text(token_ids(self.tokenizer, prompts, self.model))
        return Conditioning({"text": text})

    @torch.no_grad()
    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        assert candidates.images is not None
        return self.model.score_features(candidates.images, text.tensors["text"], candidates.timesteps)


def load_reward_model(folder: str | Path, device: torch.device | str) -> ClipRewardModel:
    """The output of the stage `preference`."""
    model = StepAwarePreferenceModel.from_pretrained(folder).to(device)
    return ClipRewardModel(model, load_tokenizer(str(folder)))
