"""Several images of a prompt count as their mean."""

import numpy as np
import pandas as pd
import pytest

from spo.config import VARIANTS, Generate, Variant
from spo.evaluation import statistics
from spo.validation.generation import each_image


def table(shift: float, per_prompt: int = 3) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(20) for _ in range(per_prompt)]
    scores = shift + generator.normal(size=len(prompts))
    return pd.DataFrame(
        {"index": range(len(prompts)), "prompt": prompts, "seed": range(7, 7 + len(prompts)), "hps": scores}
    )


def test_means_by_prompt_in_the_order_of_the_prompts() -> None:
    means = statistics.prompt_means(
        pd.DataFrame(
            {"index": range(4), "prompt": ["b", "b", "a", "a"], "seed": [5, 6, 7, 8], "hps": [1.0, 3, 5, 6]}
        )
    )
    assert means["prompt"].tolist() == ["b", "a"] and means["seed"].tolist() == [5, 7]
    assert means["hps"].tolist() == [2.0, 5.5]


def test_spellings_of_a_prompt_are_one_prompt() -> None:
    means = statistics.prompt_means(
        pd.DataFrame(
            {"index": range(3), "prompt": ["b", "A cat", "a  cat."], "seed": [5, 6, 7], "hps": [1.0, 3, 5]}
        )
    )
    assert means["prompt"].tolist() == ["b", "A cat"] and means["hps"].tolist() == [1.0, 4.0]


def test_one_image_of_each_prompt_is_left_as_it_is() -> None:
    one = table(0, per_prompt=1)
    assert statistics.prompt_means(one) is one


def test_intervals_are_of_prompts_not_of_images() -> None:
    """The images of a prompt as samples of their own would give an interval for 60 rows."""
    scores = {"base": table(0), "spo": table(1).assign(hps=lambda t: t["hps"] + t.index % 3)}
    (row,) = statistics.comparisons(scores, ["base"], 500, 0)
    assert row["n"] == 20 and row["win_rate"] == 1.0
    assert (
        row["mean_difference"] == pytest.approx(2) == row["ci_low"] == row["ci_high"]
    )  # 1 + (0 + 1 + 2) / 3


def test_images_of_a_prompt_follow_each_other_with_seeds_of_their_own() -> None:
    guided = {name: Variant(guidance=1) for name in VARIANTS}
    settings = Generate(seed=100, images_per_prompt=2, **guided)
    assert each_image(["a", "b"], settings) == (["a", "a", "b", "b"], [100, 101, 102, 103])
    assert each_image(["a", "b"], settings.model_copy(update={"images_per_prompt": 1})) == (
        ["a", "b"],
        [100, 101],
    )
