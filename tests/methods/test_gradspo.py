"""GradSPO: its loss against hand-derived values, and what its rollout stores for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import spo_settings
import torch
from spo_settings import PROMPTS

from spo.config import Spo
from spo.diffusion import ddim
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.spo import SPEC, SpoMethod
from spo.methods.stepwise.batch import StepBatch
from spo.methods.stepwise.gradspo import GradSpoMethod, batch_loss, values_of_pair


def settings(**changes) -> Spo:
    return spo_settings.settings(**{"gradspo": {}, "batch_size": 1000} | changes)


@pytest.fixture
def collected(backbone, reward_model, schedule):
    """A method with wide clamps, and the pairs of one rollout of it."""
    method = GradSpoMethod(settings(clip=0.9, beta=3.0), schedule, reward_model, PROMPTS, seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    return method, batch


def test_the_recipe_is_the_published_one() -> None:
    config = settings()
    assert (config.gradspo.scale, config.gradspo.sampler_ema) == (0.5, 0.9)
    assert (Spo.model_fields["beta"].default, Spo.model_fields["clip"].default) == (10, 0.1)
    assert Spo.model_fields["divert_start_step"].default == 4
    assert SPEC.sampler_ema(config) == 0.9 and SPEC.sampler_ema(settings(gradspo=None)) == 0


def test_values_by_hand() -> None:
    """Of two numbers: the winner's place is (.5, 3), the loser's (1.5, 1)."""
    eps, sampler, shift = (torch.tensor(x).view(1, 2, 1, 1) for x in ([1.5, 2.0], [1.0, 2.0], [0.5, -1.0]))
    win, lose = values_of_pair(eps, sampler, shift)
    assert win.tolist() == [-(1.0 + 1.0) / 2] and lose.tolist() == [-(0.0 + 1.0) / 2]


def one_number(eps: float, reference: float, sampler: float, n_best: float, n_worst: float, **changes):
    """The loss of one pair of one latent number at t = 401, drawn from `sampler`'s output at x_t = .3."""
    schedule = Schedule.from_config({"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, 5)
    tensor = lambda x: torch.full((1, 1, 1, 1), x, dtype=torch.float64)  # noqa: E731
    t, x_t = torch.tensor([401]), tensor(0.3)
    step = ddim.transition(schedule, tensor(sampler), t, x_t, 1.0)
    batch = StepBatch(
        x_t=x_t,
        timesteps=t,
        conditioning=None,
        weight=torch.ones(1),
        x_win=ddim.sample(step, tensor(n_best)),
        x_lose=ddim.sample(step, tensor(n_worst)),
        output=tensor(sampler),
    )
    losses, metrics = batch_loss(tensor(eps), tensor(reference), batch, schedule, settings(**changes))
    return float(losses), metrics, float((1 - schedule.alphas_cumprod[401]).sqrt())


def test_the_loss_of_one_number_by_hand() -> None:
    """n = (1.2 - -.6) / 2 = .9; winner's place sampler - .5 sqrt(1 - abar) .9, loser's with +."""
    loss, metrics, noise_level = one_number(0.2, 0.15, 0.1, 1.2, -0.6, clip=0.9)
    shift = 0.5 * noise_level * 0.9
    win = -((0.2 - (0.1 - shift)) ** 2) + (0.15 - (0.1 - shift)) ** 2
    lose = -((0.2 - (0.1 + shift)) ** 2) + (0.15 - (0.1 + shift)) ** 2
    assert float(metrics["win_log_ratio"]) == pytest.approx(win, abs=1e-6)
    assert float(metrics["lose_log_ratio"]) == pytest.approx(lose, abs=1e-6)
    assert win < lose and float(metrics["implicit_accuracy"]) == 0  # the winner asks for less noise
    assert loss == pytest.approx(math.log1p(math.exp(-10 * (win - lose))), rel=1e-5)
    closed = -4 * shift * (0.2 - 0.15)  # the sampler's prediction cancels
    assert win - lose == pytest.approx(closed, rel=1e-9)


def test_the_clamp_is_that_of_spo() -> None:
    """The winner's ratio, .035, is beyond log 1.01; the loser's, -.035, beyond log .99."""
    loss, metrics, _ = one_number(0.1, 0.15, 0.15, 1.2, -0.6, clip=0.01)
    assert float(metrics["win_log_ratio"]) > math.log(1.01)
    assert float(metrics["lose_log_ratio"]) < math.log(0.99)
    assert float(metrics["clipped_fraction"]) == 1
    assert loss == pytest.approx(math.log1p(math.exp(-10 * (math.log(1.01) - math.log(0.99)))), rel=1e-5)


def test_what_both_noises_have_in_common_does_not_count() -> None:
    first, second = (one_number(0.2, 0.15, 0.1, 1.2 + c, -0.6 + c, clip=0.9)[0] for c in (0.0, 0.7))
    assert first == pytest.approx(second, rel=1e-6)


def test_a_batch_has_the_output_that_drew_its_pairs(backbone, collected, schedule) -> None:
    """Candidates lie around its mean; with the noise from them, the loss is that of the closed form."""
    method, batch = collected
    denoiser = GuidedDenoiser.of(backbone, batch.conditioning, method.guidance)
    assert torch.allclose(batch.output, denoiser(batch.x_t, batch.timesteps).detach(), atol=1e-6)
    policy, reference = batch.output + 0.02 * batch.x_win, batch.output - 0.01 * batch.x_lose
    losses, metrics = method.loss(policy, reference, batch)
    step = ddim.transition(schedule, batch.output, batch.timesteps, batch.x_t, 1.0)
    noises = [(x - step.mean) / step.std for x in (batch.x_win, batch.x_lose)]
    assert 0.8 < float(torch.cat(noises).std()) < 1.6
    shift = 0.5 * (1 - schedule.alpha(batch.timesteps)).sqrt() * (noises[0] - noises[1]) / 2
    gap = -4 * (shift * (policy - reference)).mean((1, 2, 3))
    expected = torch.log1p(torch.exp(-3.0 * gap))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert float(losses.std()) > 1e-4 and (metrics["clipped_fraction"] == 0).all()
    theirs = SpoMethod(settings(gradspo=None), schedule, None, PROMPTS, 0).loss(policy, reference, batch)[1]
    assert torch.equal(metrics["kl"], theirs["kl"])


def test_where_nothing_is_clamped_the_sampler_does_not_matter(collected) -> None:
    method, batch = collected
    policy, reference = batch.output + 0.02 * batch.x_win, batch.output
    losses, _ = method.loss(policy, reference, batch)
    other, _ = method.loss(policy, reference, replace(batch, output=batch.output + 0.1))
    torch.testing.assert_close(other, losses, rtol=1e-4, atol=1e-5)
    narrow = GradSpoMethod(settings(clip=0.001), method.schedule, None, PROMPTS, seed=0)
    one, another = (
        narrow.loss(policy, reference, b)[0] for b in (batch, replace(batch, output=batch.output + 0.1))
    )
    assert float((one - another).abs().max()) > 1e-3


def test_a_gradient_step_goes_from_the_loser_to_the_winner(collected) -> None:
    """The predicted noise moves along -n, at every t."""
    method, batch = collected
    policy = batch.output.clone().requires_grad_()
    losses, _ = method.loss(policy, batch.output, batch)
    assert torch.allclose(losses.detach(), torch.full_like(losses, math.log(2)))
    losses.sum().backward()
    direction = (batch.x_win - batch.x_lose).flatten(1)
    cosine = torch.cosine_similarity(policy.grad.flatten(1), direction, dim=1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-4)
    after, metrics = method.loss(policy.detach() - 0.1 * policy.grad, batch.output, batch)
    assert (after < losses.detach()).all() and (metrics["implicit_accuracy"] == 1).all()


def test_a_model_that_predicts_v_has_the_loss_of_its_eps(collected) -> None:
    method, batch = collected
    alpha = method.schedule.alpha(batch.timesteps)
    as_v = lambda eps: (eps - (1 - alpha).sqrt() * batch.x_t) / alpha.sqrt()  # noqa: E731
    policy, reference = batch.output + 0.02 * batch.x_win, batch.output
    expected, _ = method.loss(policy, reference, batch)
    method.schedule = replace(method.schedule, prediction_type="v_prediction")
    losses, _ = method.loss(as_v(policy), as_v(reference), replace(batch, output=as_v(batch.output)))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("scale", "valid"), [(0.0, 3), (10.0, 9)])
def test_every_pair_of_the_last_step_is_valid(backbone, reward_model, schedule, scale, valid) -> None:
    """Three prompts and three steps. Equal scores give gaps of 0, which are above no threshold."""
    reward_model.scale = scale
    method = GradSpoMethod(settings(threshold=0.001), schedule, reward_model, PROMPTS, seed=0)
    ((batch,),), metrics = method.collect(backbone, 0)
    assert metrics["pairs"] == valid == len(batch.weight) and float(batch.weight.min()) == 1
    assert metrics["valid_fraction/t0001"] == 1
    assert batch.timesteps.unique().tolist() == ([1] if scale == 0 else [1, 201, 401])
    _, spo = SpoMethod(
        settings(threshold=0.001, gradspo=None), schedule, reward_model, PROMPTS, seed=0
    ).collect(backbone, 0)
    assert spo["pairs"] == (0 if scale == 0 else 9)


def test_a_range_without_the_last_step_has_its_thresholds(backbone, reward_model, schedule) -> None:
    config = settings(threshold=0.5, timestep_range=(100, 900))
    assert GradSpoMethod(config, schedule, reward_model, PROMPTS, seed=0).rollout.thresholds == [0.5, 0.5]


def test_inner_steps_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="gradspo needs inner_steps 1, not 3"):
        settings(inner_steps=3)


def test_only_gradspo_stores_the_outputs_of_the_rollout(backbone, reward_model, schedule) -> None:
    """They are as large as a third of a pair's latents, and sent to all processes."""
    for kind, stored in ((SpoMethod, False), (GradSpoMethod, True)):
        method = kind(settings(), schedule, reward_model, PROMPTS, seed=0)
        with backbone.inference():
            noise = SampleNoise(0, PROMPTS[:2], backbone.latent_shape)
            steps = list(method.rollout.run(backbone, PROMPTS[:2], noise))
        assert steps and {step.output is not None for step in steps} == {stored}


def test_the_shift_of_a_flow_is_in_units_of_its_noise(flow, reward_model) -> None:
    """sigma in place of sqrt(1 - abar); eps = x + (1 - sigma) v."""
    section = settings(clip=0.9, beta=3.0, divert_start_step=1)
    method = GradSpoMethod(section, flow.schedule(5), reward_model, PROMPTS, seed=0)
    ((batch,),), _ = method.collect(flow, 0)
    policy = batch.output + 0.01 * batch.x_win
    _, metrics = method.loss(policy, batch.output, batch)
    sigma = (batch.timesteps / 1000).view(-1, 1, 1, 1)
    std = ddim.standard_deviation(method.schedule, batch.timesteps, 1.0)
    shift = 0.5 * sigma * (batch.x_win - batch.x_lose) / (2 * std)
    change = (1 - sigma) * 0.01 * batch.x_win
    expected = -((change + shift).square() - shift.square()).mean((1, 2, 3))
    torch.testing.assert_close(metrics["win_log_ratio"], expected, rtol=1e-3, atol=1e-5)
