"""Ours and the official algorithms (benchmarks/official.py) and diffusers' pipeline compute the same.

In the sizes of the preset smoke; nothing is timed.
"""

from collections.abc import Iterator

import pytest
import yaml

from benchmarks import images, lpo, models, offline, spo
from benchmarks.measure import Case
from spo import config


@pytest.fixture
def smoke() -> models.Models:
    return models.load(config.validate(yaml.safe_load(config.preset("smoke"))))


def assert_equal(cases: Iterator[Case], names: list[str]) -> None:
    """Each case has the name that is expected, and the same results on both sides."""
    found = list(cases)
    assert [case.name.split(" of ")[0] for case in found] == names
    for case in found:
        case.check()


@pytest.mark.smoke
def test_spo_is_the_official_algorithm(smoke) -> None:
    cases = spo.cases(smoke, spo.settings(smoke, 3))
    parts = [
        "rollout, decoding and preference scores",
        "decoding",
        "preference scores",
        "training step",
        "iteration",
    ]
    assert_equal(cases, parts)


def test_candidates_are_scored_the_same_alone_and_together(smoke) -> None:
    assert_equal(lpo.cases(smoke, 3, 4), ["LPO: rollout and preference scores"])


def test_diffusion_dpo_is_its_official_update(smoke) -> None:
    assert_equal(offline.diffusion_dpo(smoke, 4), ["Diffusion-DPO: update"])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_preference_model_learns_as_officially(smoke, guidance: float) -> None:
    changed = smoke.params.preference.model_copy(update={"guidance": guidance})
    smoke.params = smoke.params.model_copy(update={"preference": changed})
    assert_equal(offline.preference_model(smoke, 4), ["preference model: update"])


def test_generation_is_that_of_diffusers(smoke) -> None:
    assert_equal(images.generation(smoke, 2), ["generation"])


def test_scores_are_the_same_one_by_one(smoke) -> None:
    found = images.scorers(smoke.params, 4)
    assert_equal(images.scoring(found, smoke, 4), [f"scoring: {name}" for name in images.SCORERS])
