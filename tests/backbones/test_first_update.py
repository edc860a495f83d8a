"""Before any update the policy is the reference; its log-probs are those of the rollout but for rounding."""

from __future__ import annotations

import pytest

from spo import config
from spo.diffusion.finite import FiniteCheck
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.methods.stepwise.gradspo import GradSpoMethod
from spo.methods.stepwise.method import sampler_schedule
from spo.preference.latent import LatentPreferenceModel, LatentRewardModel
from spo.preference.model import ClipRewardModel
from spo.training.alignment import Alignment, make_trainable
from spo.types import FIRST_UPDATE

PROMPTS = ["a circle", "a blue star on sand", "a large red square"]
SECTION = {
    "lora": {"rank": 2, "alpha": 2},
    "optimizer": {"learning_rate": 1e-3},
    "iterations": 1,
    "prompts_per_iteration": 3,
    "batch_size": 4,
    "candidates": 2,
    "num_inference_steps": 4,
    "guidance": 2.0,
    "divert_start_step": 1,
    "threshold": 0.0,
}


def first_update(backbone, name, lora, reward_model, pairs) -> dict[str, float]:
    """The gauges of a method's first update."""
    if name == "diffusion_dpo":
        section = config.DiffusionDpo(
            lora=SECTION["lora"], optimizer=SECTION["optimizer"], iterations=1, batch_size=4
        )
        method = DiffusionDpoMethod(section, backbone.schedule(20), pairs, seed=0)
    elif name == "lpo":
        section = config.Lpo(**SECTION)
        latent = LatentPreferenceModel(backbone.feature_model(), 1.0)
        judge = LatentRewardModel(latent, "candidate")
        method = LpoMethod(section, sampler_schedule(section, backbone), judge, PROMPTS, seed=0)
    else:
        kind = SpoMethod if name == "spo" else GradSpoMethod
        section = config.Spo(**SECTION, gradspo=None if name == "spo" else {})
        method = kind(section, sampler_schedule(section, backbone), reward_model, PROMPTS, seed=0)
    make_trainable(backbone, config.Lora(**SECTION["lora"]) if lora else None, 0)
    objective = Alignment(f"align.{name}", backbone, method)
    ((batch, *_), *_), _ = objective.collect(0)
    _, metrics = objective.loss(batch, FiniteCheck())
    return {
        k.removeprefix(FIRST_UPDATE): float(m.values.max())
        for k, m in metrics.items()
        if k.startswith(FIRST_UPDATE)
    }


@pytest.mark.parametrize(
    ("name", "lora"),
    [("spo", True), ("spo", False), ("gradspo", True), ("lpo", True), ("diffusion_dpo", True)],
)
def test_policy_and_reference_are_the_same_in_fp32(load, model, words, pairs, name, lora) -> None:
    gauges = first_update(load("sd"), name, lora, ClipRewardModel(model, words), pairs)
    assert gauges.pop("policy_to_reference") == 0
    assert list(gauges) == ([] if name == "diffusion_dpo" else ["rollout_to_policy"])
    assert all(value < 1e-4 for value in gauges.values())


def test_how_far_apart_they_are_in_bf16_is_a_number_of_the_run(load, model, words, pairs) -> None:
    backbone = load("sd", dtype="bf16")
    gauges = first_update(backbone, "spo", False, ClipRewardModel(model, words), pairs)
    assert len(gauges) == 2 and all(0 <= value < 0.05 for value in gauges.values())
