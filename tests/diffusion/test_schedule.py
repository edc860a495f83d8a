import math

import pytest
import torch

from spo.diffusion.schedule import Schedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
PLAIN = {"clip_sample": False}


def test_cumulative_products_by_hand() -> None:
    schedule = Schedule.from_config({"trained_betas": [0.1, 0.2, 0.5]}, 3)
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36])
    assert schedule.num_train_timesteps == 3


def test_linear_betas_are_the_default() -> None:
    alphas = Schedule.from_config({}, 10).alphas_cumprod
    assert len(alphas) == 1000
    assert float(alphas[0]) == pytest.approx(1 - 0.0001)
    assert float(alphas[-1] / alphas[-2]) == pytest.approx(1 - 0.02)


def test_scaled_linear_is_linear_in_the_root() -> None:
    alphas = Schedule.from_config(SD, 10).alphas_cumprod.double()
    betas = 1 - alphas[1:] / alphas[:-1]
    steps = betas.sqrt().diff()
    assert float(1 - alphas[0]) == pytest.approx(0.00085, rel=1e-3)
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=0.05)


def test_cosine_schedule_closed_form() -> None:
    """Betas of a function of t telescope to that function, up to the capped last one."""
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    alphas = Schedule.from_config(config, 5).alphas_cumprod
    for i in (0, 24, 48):
        bar = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, i + 1)]
        assert float(alphas[i]) == pytest.approx(bar[1] / bar[0], rel=1e-4)


def test_zero_terminal_snr() -> None:
    config = {**SD, "prediction_type": "v_prediction"}
    before = Schedule.from_config(config, 10).alphas_cumprod
    after = Schedule.from_config({**config, "rescale_betas_zero_snr": True}, 10).alphas_cumprod
    assert float(after[-1]) == pytest.approx(0, abs=1e-9)
    assert float(after[0]) == pytest.approx(float(before[0]))
    assert (after.diff() < 0).all()


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [
        ("leading", 0, [8, 6, 4, 2, 0]),
        ("leading", 1, [9, 7, 5, 3, 1]),
        ("trailing", 0, [9, 7, 5, 3, 1]),
        ("linspace", 0, [9, 7, 4, 2, 0]),  # 6.75, 4.5 (to even), 2.25
    ],
)
def test_timesteps_by_hand(spacing: str, offset: int, expected: list[int]) -> None:
    config = {"num_train_timesteps": 10, "timestep_spacing": spacing, "steps_offset": offset}
    assert Schedule.from_config(config, 5).timesteps.tolist() == expected


def test_stable_diffusion_timesteps() -> None:
    timesteps = Schedule.from_config(SD, 20).timesteps.tolist()
    assert timesteps == [1 + 50 * i for i in range(19, -1, -1)]
    assert timesteps[4] == 751  # where the paper's candidates begin


@pytest.mark.parametrize(("to_one", "last"), [(True, 1.0), (False, 0.9)])
def test_previous_alpha(to_one: bool, last: float) -> None:
    config = {"trained_betas": [0.1, 0.2, 0.5, 0.5], "set_alpha_to_one": to_one}
    schedule = Schedule.from_config(config, 2)  # timesteps 2, 0
    previous = schedule.alpha_previous(torch.tensor([2, 3, 0, 1]))
    assert previous.shape == (4, 1, 1, 1)
    assert previous.flatten().tolist() == pytest.approx([0.9, 0.72, last, last])


@pytest.mark.parametrize(
    ("spacing", "count", "ends"),
    [
        ("linspace", 5, [7, 4, 2, 0]),  # of 9, 7, 4, 2; T // N is 2
        ("linspace", 3, [4, 0]),  # of 9, 4; T // N is 3
        ("linspace", 1, []),
        ("trailing", 3, [6, 2]),  # of 9, 6: thirds of 10, rounded
        ("trailing", 5, [7, 5, 3, 1]),
        ("leading", 4, [4, 2, 0]),
    ],
)
def test_a_step_ends_at_the_next_timestep_of_the_list(spacing: str, count: int, ends: list[int]) -> None:
    """alpha-bar at t is .9 ^ (t + 1)."""
    config = {"trained_betas": [0.1] * 10, "timestep_spacing": spacing}
    schedule = Schedule.from_config(config, count)
    expected = [0.9 ** (t + 1) for t in ends] + [1.0]
    assert schedule.alpha_previous(schedule.timesteps).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_inverts_noising(prediction_type: str) -> None:
    schedule = Schedule.from_config({**SD, "prediction_type": prediction_type}, 20)
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 333, 751, 999])
    x_t = schedule.add_noise(x0, noise, timesteps)
    target = schedule.training_target(x0, noise, timesteps)
    back, eps = schedule.predict(target, timesteps, x_t)
    assert torch.allclose(back, x0, atol=1e-5)  # alpha-bar itself is fp32
    assert torch.allclose(eps, noise, atol=1e-5)
    assert torch.equal(schedule.predict_x0(target, timesteps, x_t), back)


def test_noising_by_hand() -> None:
    schedule = Schedule.from_config({"trained_betas": [0.36, 0.75], **PLAIN}, 2)  # alpha-bar .64, .16
    x0, noise = torch.full((2, 1, 1, 1), 10.0), torch.full((2, 1, 1, 1), 1.0)
    x_t = schedule.add_noise(x0, noise, torch.tensor([0, 1]))
    assert x_t.flatten().tolist() == pytest.approx([8.6, 4 + math.sqrt(0.84)])


def test_half_precision_is_computed_in_single() -> None:
    schedule = Schedule.from_config(SD, 20)
    x_t = torch.randn(1, 1, 2, 2).half()
    assert schedule.predict_x0(x_t, torch.tensor([500]), x_t).dtype == torch.float32


@pytest.mark.parametrize(("extra", "bound"), [({}, 1.0), ({"clip_sample_range": 2.0}, 2.0)])
def test_clip_sample(extra: dict, bound: float) -> None:
    schedule = Schedule.from_config({"clip_sample": True, **extra}, 10)
    x_t = torch.tensor([-30.0, 0.1, 30.0]).view(1, 1, 1, 3)
    x0 = schedule.predict_x0(torch.zeros_like(x_t), torch.tensor([0]), x_t)
    assert x0.flatten().tolist() == pytest.approx([-bound, 0.1 / math.sqrt(0.9999), bound])


@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"clip_sample_range": 2.0}])
def test_latents_are_clipped_only_where_the_file_says_so(config: dict) -> None:
    x_t = torch.full((1, 1, 1, 1), 30.0)
    x0 = Schedule.from_config(config, 10).predict_x0(torch.zeros_like(x_t), torch.tensor([0]), x_t)
    assert float(x0) == pytest.approx(30 / math.sqrt(0.9999))


@pytest.mark.parametrize(
    ("config", "steps", "word"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 10, "_class_name"),
        ({"_class_name": "EDMEulerScheduler"}, 10, "_class_name"),
        ({"_class_name": "LCMScheduler"}, 10, "_class_name"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, 10, "use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, 10, "timestep_type"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 10, "variance_type"),
        ({"prediction_type": "flow_prediction"}, 10, "prediction_type"),
        ({"clip_sample": "false"}, 10, "clip_sample"),
        ({"prediction_type": "sample"}, 10, "prediction_type"),
        ({"thresholding": True}, 10, "thresholding"),
        ({"beta_schedule": "sigmoid"}, 10, "beta_schedule"),
        ({"timestep_spacing": "karras"}, 10, "timestep_spacing"),
        ({"rescale_betas_zero_snr": True}, 10, "v_prediction"),
        ({}, 1001, "num_inference_steps"),
        ({}, 0, "num_inference_steps"),
        ({"steps_offset": 1}, 1000, "steps_offset"),
    ],
)
def test_unsupported_settings_give_one_line(config: dict, steps: int, word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        Schedule.from_config(config, steps)
    assert "\n" not in str(error.value)


def test_settings_of_other_samplers_are_not_read() -> None:
    extra = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    assert torch.equal(
        Schedule.from_config({**SD, **extra}, 20).timesteps, Schedule.from_config(SD, 20).timesteps
    )
