"""LPO: thresholds by sigma, and a rollout whose reward model sees the latents alone."""

from __future__ import annotations

import pytest
import torch
from spo_settings import PROMPTS

from spo.config import Lpo
from spo.diffusion import ddim
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.lpo import LpoMethod
from spo.methods.spo import SpoMethod
from spo.methods.stepwise import pairs as step_pairs
from spo.methods.stepwise.cost import cost_by_latents
from spo.training.compute import DOWN_PATH, TRAINED

# Of DDIM at eta 1 with the betas of SD 1.5 and 20 steps: sigma at t = 1, 51, ..., 951, and the paper's
# thresholds from .35 to .5 at these steps, to three digits.
SIGMAS = [
    *(0.0206, 0.0406, 0.1673, 0.2144, 0.2509, 0.2836, 0.3144, 0.3442, 0.3732, 0.4016),
    *(0.4293, 0.4565, 0.4829, 0.5087, 0.5336, 0.5576, 0.5807, 0.6029, 0.6241, 0.6444),
]
THRESHOLDS = [
    *(0.35, 0.355, 0.385, 0.397, 0.405, 0.413, 0.421, 0.428, 0.435, 0.442),
    *(0.448, 0.455, 0.461, 0.467, 0.473, 0.479, 0.485, 0.490, 0.495, 0.5),
]


def settings(**changes) -> Lpo:
    fields = {
        "lora": {"rank": 1, "alpha": 1},
        "optimizer": {"learning_rate": 1e-3},
        "iterations": 4,
        "prompts_per_iteration": 3,
        "batch_size": 1000,
        "candidates": 4,
        "num_inference_steps": 5,
        "guidance": 2.0,
        "divert_start_step": 0,
        "threshold": 0.0,
        "threshold_by": "sigma",
    }
    return Lpo(**{**fields, **changes})


def test_thresholds_of_sd15_by_the_sigmas_of_its_twenty_steps(backbone) -> None:
    schedule = Schedule.from_config(backbone.scheduler_config, 20)
    assert schedule.timesteps.tolist() == list(range(951, 0, -50))
    deviations = ddim.standard_deviation(schedule, schedule.timesteps, 1.0).flatten()
    assert deviations.flip(0).tolist() == pytest.approx(SIGMAS, abs=6e-5)
    config = settings(num_inference_steps=20, threshold=0.5, threshold_end=0.35)
    blocks = step_pairs.blocks(config, schedule)
    assert blocks == [[i] for i in range(20)]
    found = step_pairs.thresholds(config, schedule, blocks)
    assert found[::-1] == pytest.approx(THRESHOLDS, abs=6e-4)
    assert (found[0], found[-1]) == (0.5, pytest.approx(0.35))


def test_nothing_is_predicted_or_decoded_for_latents(backbone, latent_reward_model, schedule) -> None:
    def decode(latents):
        raise AssertionError("decoded")

    backbone.decode = decode
    method = LpoMethod(settings(), schedule, latent_reward_model, PROMPTS, seed=0)
    ((batch,),), metrics = method.collect(backbone, 0)
    # guided: three prompts and three empty ones a step; SPO would add 2 * 12 a diverted step
    assert backbone.predicted == [2 * 3] * 5
    assert metrics["pairs"] == 5 * 3 and batch.timesteps.unique().tolist() == [1, 201, 401, 601, 801]
    assert [len(seen) for seen in latent_reward_model.images] == [12] * 5
    asked = [times.unique(dim=1).flatten().tolist() for times in latent_reward_model.timesteps]
    assert asked == [[601, 801], [401, 601], [201, 401], [1, 201], [0, 1]]  # own, of the step


def test_the_candidates_that_are_scored_are_those_of_the_pair(
    backbone, latent_reward_model, schedule
) -> None:
    method = LpoMethod(settings(), schedule, latent_reward_model, PROMPTS, seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    for number, t in enumerate((801, 601, 401, 201, 1)):
        seen = latent_reward_model.images[number]
        for i in (batch.timesteps == t).nonzero().flatten().tolist():
            length = batch.conditioning.tensors["length"][i]
            mine = seen[latent_reward_model.lengths[number] == length]
            means = mine.mean((1, 2, 3))
            assert len(mine) == 4
            assert torch.equal(batch.x_win[i], mine[means.argmax()])
            assert torch.equal(batch.x_lose[i], mine[means.argmin()])


def test_thresholds_leave_out_pairs_by_their_step(backbone, latent_reward_model, schedule) -> None:
    config = settings(threshold=0.9, threshold_end=0.3)
    latent_reward_model.scale = 8.0
    rollout = LpoMethod(config, schedule, latent_reward_model, PROMPTS, seed=0).rollout
    noise = SampleNoise(0, PROMPTS, backbone.latent_shape)
    sigma = ddim.standard_deviation(schedule, schedule.timesteps, 1.0).flatten()
    low, high = sigma.min(), sigma.max()
    with backbone.inference():
        steps = list(rollout.run(backbone, PROMPTS, noise))
    for step in steps:
        least = 0.3 + 0.6 * (sigma[step.step] - low) / (high - low)
        gap = step.scores.amax(0), step.scores.amin(0)
        shares = torch.stack(gap).softmax(0)
        assert torch.equal(step.valid, shares[0] - shares[1] > least)
    valid = torch.stack([step.valid for step in steps])
    assert valid.any() and not valid.all()


def test_the_loss_is_that_of_spo(backbone, latent_reward_model, schedule) -> None:
    lpo = LpoMethod(settings(beta=500, clip=0.1), schedule, latent_reward_model, PROMPTS, seed=0)
    spo = SpoMethod(settings(beta=500, clip=0.1), schedule, latent_reward_model, PROMPTS, seed=0)
    ((batch,),), _ = lpo.collect(backbone, 0)
    policy, reference = batch.x_t * 0.51, batch.x_t * 0.5
    ours, theirs = (method.loss(policy, reference, batch)[0] for method in (lpo, spo))
    assert torch.equal(ours, theirs) and float(ours.std()) > 0


@pytest.mark.parametrize(("feature_guidance", "passes"), [(1.0, 1), (7.5, 2)])
def test_cost_counts_the_down_path_once_a_candidate_and_twice_with_the_vfe(
    backbone, feature_guidance, passes
) -> None:
    """K = 4, five steps, guidance 2, three prompts in four iterations."""
    cost = cost_by_latents("align.lpo", settings(), backbone.schedule, feature_guidance)
    of_a_prompt = 2 * 5 + 5 * 4 * passes * DOWN_PATH + 5 * (1 + TRAINED) * 2
    assert cost.unet_samples == round(12 * of_a_prompt)
    assert cost.text == "12 rollouts in 4 iterations; at most 60 pairs, 4 updates"
