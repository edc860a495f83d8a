import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from spo.rewards.scorer import BatchedScorer


class Scripted(BatchedScorer):
    """Gives what a function of images and prompts gives."""

    name = "some_scorer"

    def __init__(self, function) -> None:
        super().__init__(SimpleNamespace(image_size=1), batch_size=2)
        self.score_batch = function

    def load(self, settings) -> None:
        """It has no files."""

    def score_batch(self, images, prompts) -> torch.Tensor:
        raise NotImplementedError


def score(function, n_images: int, prompts: list[str]) -> list[float]:
    images = [Image.new("RGB", (i + 1, 1)) for i in range(n_images)]
    return Scripted(function).score(images, prompts)


def width_and_length(images, prompts) -> torch.Tensor:
    return torch.tensor([100.0 * i.width + len(p) for i, p in zip(images, prompts, strict=True)])


def test_each_image_is_scored_for_its_own_prompt_in_order() -> None:
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert score(width_and_length, 5, prompts) == [101, 202, 303, 404, 505]
    assert score(width_and_length, 0, []) == []


@pytest.mark.parametrize("n_prompts", [0, 1, 4])
def test_lengths_must_agree(n_prompts: int) -> None:
    with pytest.raises(ValueError, match=f"^some_scorer: 3 images, but {n_prompts} prompts") as error:
        score(width_and_length, 3, ["p"] * n_prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["a <|endoftext|> b", "a <end_of_text> b", "a [SEP] b", "a\0b"])
def test_a_prompt_that_cannot_be_encoded_gets_no_score(prompt: str) -> None:
    with pytest.raises(ValueError, match="some_scorer: the prompt 'a.*b' has .*; it cannot be encoded"):
        score(width_and_length, 2, ["fine", prompt])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_its_prompt(bad: float) -> None:
    def one_bad(images, prompts):
        return torch.tensor([bad if p == "the bad one" else 1.0 for p in prompts])

    with pytest.raises(ValueError, match="some_scorer: .*'the bad one'"):
        score(one_bad, 3, ["fine", "fine too", "the bad one"])


def test_no_gradients_are_stored() -> None:
    seen = []

    def no_gradients(images, prompts):
        seen.append(torch.is_grad_enabled())
        return torch.zeros(len(images))

    score(no_gradients, 1, ["p"])
    assert seen == [False]
