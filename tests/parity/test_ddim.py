"""DDIM against golden figures: samples and log-probs of the official implementation."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.diffusion import ddim
from spo.diffusion.schedule import Schedule

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden"
CASES = [(p, n, eta) for p in ("epsilon", "v_prediction") for n in (20, 50) for eta in (0.5, 1.0)]


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("prediction_type", "steps", "eta"), CASES)
def test_ddim_matches_golden(prediction_type: str, steps: int, eta: float) -> None:
    config = json.loads((GOLDEN / "ddim_scheduler.json").read_text())
    schedule = Schedule.from_config({**config, "prediction_type": prediction_type}, steps)
    with np.load(GOLDEN / f"ddim_{prediction_type}_{steps}_eta{eta}.npz") as file:
        golden = {k: torch.from_numpy(v) for k, v in file.items()}

    assert torch.equal(schedule.timesteps, golden["timesteps"])
    step = ddim.transition(schedule, golden["model_output"], golden["timesteps"], golden["x_t"], eta)
    assert difference(step.x0, golden["pred_original_sample"]) < 1e-4
    assert difference(step.std.flatten(), golden["std"]) < 1e-4
    assert difference(ddim.log_prob(step, golden["prev_sample"]), golden["log_prob"]) < 1e-4
    perturbed = ddim.log_prob(step, golden["perturbed_prev_sample"])
    assert difference(perturbed, golden["perturbed_log_prob"]) < 1e-4

    # the golden samples' noise is not stored: what is left after the mean must be a standard normal draw
    noise = (golden["prev_sample"] - step.mean) / step.std
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    assert difference(ddim.sample(step, noise), golden["prev_sample"]) < 1e-4


SCHEDULERS = {
    "defaults": {},
    "sd15": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0},
    "trained": {"trained_betas": [0.01, 0.02, 0.04, 0.08] * 25, "num_train_timesteps": 100},
    "trailing, zero terminal SNR": {
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "clip_sample": False,
    },
    "linspace": {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
}
UNEVEN = {("linspace", 3), ("linspace", 20), ("linspace", 50), ("trailing, zero terminal SNR", 3)}


@pytest.mark.parametrize("steps", [3, 20, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_ddim_matches_diffusers(name: str, steps: int) -> None:
    """Every kind of config that is supported, and the defaults of missing keys.

    diffusers ends a step T // N before its timestep: where the list is UNEVEN, N is made to fit each step.
    """
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**SCHEDULERS[name])
    theirs.set_timesteps(steps)
    ours = Schedule.from_config({"clip_sample": True, **SCHEDULERS[name]}, steps)  # DDIM's own default
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert difference(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-6

    generator = torch.Generator().manual_seed(0)
    x_t, output, noise = (torch.randn(steps, 2, 3, 3, generator=generator) for _ in range(3))
    step = ddim.transition(ours, output, ours.timesteps, x_t, eta=0.7)
    prev = ddim.sample(step, noise)
    ends = [*ours.timesteps[1:].tolist(), -1]
    for i, t in enumerate(ours.timesteps):
        if (name, steps) in UNEVEN:
            theirs.num_inference_steps = Fraction(ours.num_train_timesteps, int(t) - ends[i])
        expected = theirs.step(output[i : i + 1], t, x_t[i : i + 1], eta=0.7, variance_noise=noise[i : i + 1])
        assert difference(step.x0[i : i + 1], expected.pred_original_sample) < 1e-4
        assert difference(prev[i : i + 1], expected.prev_sample) < 1e-4
