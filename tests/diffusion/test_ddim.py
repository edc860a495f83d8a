import math

import pytest
import torch

from spo.diffusion import ddim
from spo.diffusion.schedule import Schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SD |= {"steps_offset": 1, "set_alpha_to_one": False}
ONE = torch.ones(1, 1, 1, 1)


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(n, 2, 3, 4, generator=generator) for _ in range(3))
    return x, output, noise


def test_deterministic_step_by_hand() -> None:
    """alpha-bar .16 -> .64, x_t 2, eps .5: x_0 = (2 - .5 sqrt(.84)) / .4, then .8 x_0 + .6 eps."""
    schedule = Schedule.from_config({"trained_betas": [0.36, 0.75], "clip_sample": False}, 2)
    step = ddim.transition(schedule, 0.5 * ONE, torch.tensor([1]), 2 * ONE, eta=0)
    x0 = (2 - 0.5 * math.sqrt(0.84)) / 0.4
    assert float(step.x0) == pytest.approx(x0)
    assert float(step.mean) == pytest.approx(0.8 * x0 + 0.6 * 0.5)
    assert float(step.std) == 0


def test_full_eta_is_the_posterior_of_ddpm() -> None:
    """DDPM (arXiv 2006.11239) Eq. 7 with neighbouring timesteps: another formula, the same Gaussian."""
    schedule = Schedule.from_config({**SD, "steps_offset": 0}, 1000)
    t = torch.tensor([1, 10, 500, 999])
    x_t, output, _ = inputs(4)
    step = ddim.transition(schedule, output, t, x_t, eta=1)
    bar, previous = schedule.alphas_cumprod.double()[t], schedule.alphas_cumprod.double()[t - 1]
    alpha = bar / previous
    view = (4, 1, 1, 1)
    mean = (previous.sqrt() * (1 - alpha) / (1 - bar)).view(view) * step.x0
    mean = mean + (alpha.sqrt() * (1 - previous) / (1 - bar)).view(view) * x_t
    variance = (1 - previous) / (1 - bar) * (1 - alpha)
    assert torch.allclose(step.mean.double(), mean, rtol=1e-3, atol=1e-3)
    assert torch.allclose(step.std.double().flatten() ** 2, variance, rtol=2e-3)


def test_std_is_proportional_to_eta() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t, output, _ = inputs(20)
    half, full = (ddim.transition(schedule, output, schedule.timesteps, x_t, eta).std for eta in (0.5, 1.0))
    assert half.shape == (20, 1, 1, 1)
    assert torch.allclose(2 * half, full)
    assert torch.equal(full, ddim.standard_deviation(schedule, schedule.timesteps, 1.0))


def test_last_step_to_clean_has_no_variance() -> None:
    schedule = Schedule.from_config({**SD, "set_alpha_to_one": True}, 20)
    deviations = ddim.standard_deviation(schedule, schedule.timesteps, 1.0).flatten()
    assert deviations[-1] == 0 and (deviations[:-1] > 0).all()


def test_log_prob_is_the_normal_density_averaged_over_dimensions() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t, output, x_prev = inputs(5)
    step = ddim.transition(schedule, output, schedule.timesteps[[0, 4, 9, 18, 19]], x_t, eta=0.8)
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(x_prev).mean((1, 2, 3))
    actual = ddim.log_prob(step, x_prev)
    assert actual.shape == (5,)
    assert torch.allclose(actual, expected, rtol=1e-5)


def test_log_prob_of_a_sample_depends_on_its_noise_alone() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t, output, noise = inputs(3)
    step = ddim.transition(schedule, output, schedule.timesteps[[2, 8, 15]], x_t, eta=1)
    actual = ddim.log_prob(step, ddim.sample(step, noise))
    expected = -(noise**2).mean((1, 2, 3)) / 2 - step.std.flatten().log() - math.log(2 * math.pi) / 2
    assert torch.allclose(actual, expected, atol=1e-4)


def test_mixed_timesteps_equal_one_at_a_time() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t, output, x_prev = inputs(4)
    timesteps = schedule.timesteps[[3, 0, 19, 11]]
    together = ddim.transition(schedule, output, timesteps, x_t, eta=1)
    for i in range(4):
        one = slice(i, i + 1)
        alone = ddim.transition(schedule, output[one], timesteps[one], x_t[one], eta=1)
        assert torch.equal(alone.mean, together.mean[one]) and torch.equal(alone.std, together.std[one])
        assert torch.equal(ddim.log_prob(alone, x_prev[one]), ddim.log_prob(together, x_prev)[one])


def test_divergence_of_two_gaussians_of_one_width() -> None:
    """Dimension by dimension KL(N(a, s^2) || N(b, s^2)) = (a - b)^2 / (2 s^2); torch knows it as well."""
    mean, other = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]]), torch.zeros(2, 1, 1, 2)
    std = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    one, two = (ddim.Transition(x0=other, mean=m, std=std) for m in (mean, other))
    found = ddim.divergence(one, two)
    assert found.tolist() == pytest.approx([(1 + 4) / 0.5, 16 / 8])
    normal = torch.distributions.Normal
    wide = std.expand_as(mean)
    assert torch.allclose(
        found, torch.distributions.kl_divergence(normal(mean, wide), normal(other, wide)).sum((1, 2, 3))
    )


def test_many_candidates_of_one_transition() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t, output, _ = inputs(2)
    step = ddim.transition(schedule, output, schedule.timesteps[[5, 6]], x_t, eta=1)
    noise = torch.randn(3, *x_t.shape)
    candidates = ddim.sample(step, noise)
    assert candidates.shape == noise.shape
    assert torch.equal(candidates[1], ddim.sample(step, noise[1]))


def test_gradient_reaches_the_model_output() -> None:
    """d log p / d mean = (x_prev - mean) / std^2, over the number of dimensions; mean is linear in eps."""
    schedule = Schedule.from_config({"trained_betas": [0.36, 0.75], "clip_sample": False}, 2)
    output = torch.zeros(1, 1, 1, 2, requires_grad=True)
    step = ddim.transition(schedule, output, torch.tensor([1]), torch.ones(1, 1, 1, 2), eta=1)
    ddim.log_prob(step, (step.mean + step.std).detach()).backward()
    # alpha-bar .16 -> .64: the mean is .8 x_0 + sqrt(.36 - std^2) eps
    std = math.sqrt(0.36 / 0.84 * 0.75)
    slope = -0.8 * math.sqrt(0.84) / 0.4 + math.sqrt(0.36 - std**2)
    assert output.grad.flatten().tolist() == pytest.approx([slope / std / 2] * 2, rel=1e-4)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range(eta: float) -> None:
    schedule = Schedule.from_config(SD, 20)
    with pytest.raises(ValueError, match="eta"):
        ddim.transition(schedule, ONE, torch.tensor([1]), ONE, eta)
