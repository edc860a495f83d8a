"""Rectified flow: its schedule and steps against diffusers, closed forms and known velocities."""

import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from spo.diffusion import ddim
from spo.diffusion.announced import schedule_of
from spo.diffusion.flow import FlowSchedule
from spo.diffusion.schedule import Schedule

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD3 = {**FLOW, "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {**SD3, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLUX |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
TOKENS = 1024  # 512 x 512 pixels


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({**FLOW, "num_train_timesteps": 500}, id="no shift"),
        pytest.param(SD3, id="static shift"),
        pytest.param(FLUX, id="dynamic shift"),
        pytest.param({**FLUX, "time_shift_type": "linear"}, id="linear time shift"),
        pytest.param({**SD3, "shift_terminal": 0.1}, id="terminal"),
        pytest.param({**FLUX, "shift_terminal": 0.02}, id="dynamic shift, terminal"),
    ],
)
@pytest.mark.parametrize("flux", [False, True])
def test_deterministic_steps_are_those_of_diffusers(config, flux) -> None:
    count = 7
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    trained = theirs.timesteps
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    mu = calculate_shift(TOKENS, *lengths, 0.5, 1.15) if theirs.config.use_dynamic_shifting else None
    sigmas = torch.linspace(1, 1 / count, count).tolist() if flux else None  # as in the pipelines
    theirs.set_timesteps(None if flux else count, sigmas=sigmas, mu=mu)
    ours = schedule_of(config, count, TOKENS, 1 / count if flux else None)
    assert ours.timesteps.dtype == torch.float32
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.train_timesteps, trained, rtol=1e-6, atol=0)
    x, output = random(1), random(1, seed=1)
    for t in ours.timesteps:
        step = ddim.transition(ours, output, t[None], x, eta=0)
        expected = theirs.step(output, theirs.timesteps[len(ours.timesteps[ours.timesteps > t])], x)[0]
        torch.testing.assert_close(step.mean, expected, rtol=1e-5, atol=1e-5)
        x = step.mean


def random(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_the_class_of_the_file_chooses_the_kind() -> None:
    assert isinstance(schedule_of(SD3, 4), FlowSchedule)
    assert isinstance(schedule_of({"_class_name": "DDIMScheduler"}, 4), Schedule)
    assert isinstance(schedule_of({}, 4), Schedule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas True is not supported; use false"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas True"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas True"),
        ({"stochastic_sampling": True}, "stochastic_sampling True"),
        ({"invert_sigmas": "false"}, "invert_sigmas 'false'"),
        ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting 'yes' .*; use true or false"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting True .* without image tokens"),
        ({"time_shift_type": "cubic"}, "time_shift_type 'cubic' .*; use exponential, linear"),
        ({"shift": None}, "shift None is not supported; use a number"),
        ({"shift": 0}, "shift 0 is not supported; use a number above 0"),
        ({"shift_terminal": 1}, "shift_terminal 1 "),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 "),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "_class_name 'FlowMatchHeun.*'"),
    ],
)
def test_what_it_cannot_honour_is_one_line(change, message) -> None:
    with pytest.raises(ValueError, match=rf"^scheduler_config: {message}[^\n]*$"):
        FlowSchedule.from_config({**SD3, **change}, 20)


@pytest.mark.parametrize(("count", "change"), [(0, {}), (1, {"shift_terminal": 0.1})])
def test_too_few_steps_are_one_line(count, change) -> None:
    with pytest.raises(ValueError, match=rf"^num_inference_steps is {count}; [^\n]+$"):
        FlowSchedule.from_config({**SD3, **change}, count)


def test_standard_deviations_are_the_known_ones() -> None:
    """20 steps, shift 3, eta 1: figures of an independent calculation, three digits."""
    schedule = FlowSchedule.from_config(SD3, 20, last_sigma=1 / 20)
    known = {0: 0.983, 2: 0.734, 5: 0.550, 10: 0.409, 15: 0.284, 18: 0.120, 19: 0.0}
    deviations = ddim.standard_deviation(schedule, schedule.timesteps[list(known)], 1.0).flatten()
    assert deviations.tolist() == pytest.approx(list(known.values()), abs=6e-4)


def test_full_eta_is_precise_at_the_root_of_two() -> None:
    """Precise (arXiv 2605.23522): r = s'(1-s) / (s(1-s')), std s' sqrt(1 - r^(eta^2)), at eta^2 = 2."""
    schedule = FlowSchedule.from_config(SD3, 12)
    x, output = random(12), random(12, seed=1)
    step = ddim.transition(schedule, output, schedule.timesteps, x, eta=1)
    s = (schedule.timesteps.double() / 1000).view(-1, 1, 1, 1)
    after = torch.cat([s[1:], torch.zeros(1, 1, 1, 1)])
    std = after * (1 - (after * (1 - s) / (s * (1 - after))) ** 2).sqrt()
    mean = (1 - after) * (x - s * output) + (after**2 - std**2).clamp(min=0).sqrt() * (x + (1 - s) * output)
    torch.testing.assert_close(step.std.double(), std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.mean.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_from_pure_noise_the_std_is_eta_times_that_of_the_path(eta) -> None:
    """There is no signal at sigma 1: at eta 1 the next latents depend on x_T by the predicted x_0 alone."""
    schedule = FlowSchedule.from_config(SD3, 8)
    x, output = random(1), random(1, seed=1)
    after = float(schedule.timesteps[1]) / 1000
    step = ddim.transition(schedule, output, schedule.timesteps[:1], x, eta)
    assert float(step.std) == pytest.approx(eta * after)
    expected = (1 - after) * (x - output) + after * (1 - eta**2) ** 0.5 * x
    torch.testing.assert_close(step.mean, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_target_of_one_point_is_reached_exactly(eta) -> None:
    """v = (x - x_0) / sigma."""
    schedule = FlowSchedule.from_config(SD3, 9)
    target, x = random(1, seed=1), random(1)
    for i, t in enumerate(schedule.timesteps):
        velocity = (x - target) / schedule.noise(t[None])
        step = ddim.transition(schedule, velocity, t[None], x, eta)
        x = ddim.sample(step, random(1, seed=2 + i))
    torch.testing.assert_close(x, target, rtol=1e-5, atol=1e-5)


def errors_for_a_gaussian(count: int, eta: float) -> tuple[Tensor, Tensor]:
    """Errors of mean [3] and covariance [3,3] of samples whose target is N(m, C), its velocity known.

    A step is x' = A x + b + std z, with A and b read off its mean: mean and covariance follow in closed form.
    """
    m = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 1.5]], dtype=torch.float64)
    c, one = root @ root.T, torch.eye(3, dtype=torch.float64)
    schedule = FlowSchedule.from_config(FLOW, count, last_sigma=1 / count)
    mean, covariance = torch.zeros(3, dtype=torch.float64), one
    rows = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()  # the origin and the axes
    for t in schedule.timesteps:
        s = float(t) / 1000
        inverse = torch.linalg.inv((1 - s) ** 2 * c + s**2 * one)
        apart = (rows - (1 - s) * m) @ inverse
        velocity = s * apart - (m + (1 - s) * apart @ c)  # E[eps | x] - E[x_0 | x]
        output, x = (values.view(4, 3, 1, 1) for values in (velocity, rows))
        step = ddim.transition(schedule, output, t.expand(4), x, eta)
        after = step.mean.view(4, 3)
        b, a, std = after[0], (after[1:] - after[0]).T, float(step.std[0])
        mean, covariance = a @ mean + b, a @ covariance @ a.T + std**2 * one
    return mean - m, covariance - c


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_for_a_gaussian_the_error_falls_as_one_over_the_steps(eta) -> None:
    errors = [errors_for_a_gaussian(count, eta) for count in (20, 40, 80)]
    assert all(float(mean.abs().max()) < 1e-5 for mean, _ in errors)  # the mean is exact at any number
    sizes = [float(covariance.norm()) for _, covariance in errors]
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("config", [SD3, {"clip_sample": False}])
def test_with_x_0_of_the_exact_posterior_a_step_keeps_to_the_path(config) -> None:
    """x_0 ~ N(.5, .7^2): then x_t' has mean signal' .5 and variance (signal' .7)^2 + noise'^2."""
    schedule = schedule_of(config, 6)
    n, x_0 = 200_000, 0.5 + 0.7 * torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    eps, z = (torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for t, following in zip(schedule.timesteps[1:-1], schedule.timesteps[2:], strict=True):
        many = t.expand(n)
        # of all pairs (x_0, x_t) with this law, x_0 is a draw of the posterior given x_t
        x = schedule.add_noise(x_0, eps, many)
        step = ddim.transition(schedule, schedule.training_target(x_0, eps, many), many, x, eta=0.8)
        after = ddim.sample(step, z)
        signal, noise = float(schedule.signal(following[None])), float(schedule.noise(following[None]))
        variance = (0.7 * signal) ** 2 + noise**2
        assert float(after.mean()) == pytest.approx(0.5 * signal, abs=5 * (variance / n) ** 0.5)
        assert float(after.var()) == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)


def test_log_probs_are_those_of_scipy_and_their_gradient_is_that_of_the_density() -> None:
    schedule = FlowSchedule.from_config(SD3, 6)
    x, output = random(4).double(), random(4, seed=1).double().requires_grad_()
    step = ddim.transition(schedule, output, schedule.timesteps[1:5], x, eta=0.7)
    after = ddim.sample(step, random(4, seed=2).double()).detach().requires_grad_()
    value = ddim.log_prob(step, after)
    mean, std = step.mean.detach().numpy(), step.std.detach().numpy()
    expected = scipy.stats.norm.logpdf(after.detach().numpy(), mean, std).mean((1, 2, 3))
    assert value.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    by_output, by_x = torch.autograd.grad(value.sum(), (output, after))
    pull = (step.mean - after).detach() / step.std**2 / 24  # of 2 x 3 x 4 dimensions
    torch.testing.assert_close(by_x, pull)
    s, following = (schedule.timesteps[i : i + 4].double().view(-1, 1, 1, 1) / 1000 for i in (1, 2))
    slope = -(1 - following) * s + (following**2 - step.std**2).sqrt() * (1 - s)  # d mean / d v
    torch.testing.assert_close(by_output, -pull * slope, rtol=1e-4, atol=1e-8)


def test_half_precision_rounds_no_timestep_and_no_step() -> None:
    schedule = FlowSchedule.from_config(SD3, 20)
    x, output = (random(20, seed).bfloat16() for seed in (0, 1))
    step = ddim.transition(schedule, output, schedule.timesteps, x, eta=1)
    exact = ddim.transition(schedule, output.float(), schedule.timesteps, x.float(), eta=1)
    assert step.mean.dtype == torch.float32 and torch.equal(step.mean, exact.mean)
    with pytest.raises(AssertionError):
        schedule.noise(schedule.timesteps.bfloat16())
