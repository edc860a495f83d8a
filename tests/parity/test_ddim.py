"""DDIM against golden figures: samples and log-probs of the official implementation."""

import json
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
