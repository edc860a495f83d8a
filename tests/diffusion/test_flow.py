"""Rectified flow: its schedule and steps against diffusers, closed forms and known velocities."""

import pytest
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
