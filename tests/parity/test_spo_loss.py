"""SPO's loss and its gradient, from UNet outputs on, against golden figures of the official code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.config import Spo
from spo.diffusion import ddim
from spo.diffusion.schedule import Schedule
from spo.methods.stepwise.batch import StepBatch
from spo.methods.stepwise.loss import batch_loss
from spo.types import Conditioning

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden"


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest; to 1 where all is 0 (the gradient of pairs that are all clipped)."""
    return float((actual - expected).abs().max() / (expected.abs().max() or 1.0))


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("beta", [5, 10])
def test_loss_and_gradient_match_golden(size: str, beta: int) -> None:
    with np.load(GOLDEN / f"spo_loss_{size}_beta{beta}.npz") as file:
        golden = {name: torch.from_numpy(value) for name, value in file.items()}
    schedule = Schedule.from_config(json.loads((GOLDEN / "ddim_scheduler.json").read_text()), 20)
    config = Spo(
        lora={"rank": 1, "alpha": 1},
        optimizer={"learning_rate": 1e-3},
        iterations=1,
        prompts_per_iteration=1,
        batch_size=1,
        eta=1.0,
        beta=float(golden["beta"]),
        clip=float(golden["eps"]),
    )
    n = len(golden["x_t"])
    batch = StepBatch(
        x_t=golden["x_t"],
        timesteps=golden["timesteps"],
        conditioning=Conditioning({}),
        weight=torch.ones(n),
        x_win=golden["win"],
        x_lose=golden["lose"],
    )
    output = golden["noise_pred"].clone().requires_grad_()
    losses, metrics = batch_loss(output, golden["ref_noise_pred"], batch, schedule, config)
    assert losses.shape == (n,)
    assert difference(losses.mean().detach(), golden["loss"]) < 1e-4
    losses.mean().backward()
    assert difference(output.grad, golden["grad"]) < 1e-3

    # the golden ratios are exp of the log-ratio, clamped
    policy, reference = (
        ddim.transition(schedule, o, golden["timesteps"], golden["x_t"], 1.0)
        for o in (golden["noise_pred"], golden["ref_noise_pred"])
    )
    for side in ("win", "lose"):
        ratio = (ddim.log_prob(policy, golden[side]) - ddim.log_prob(reference, golden[side])).exp()
        clamped = ratio.clamp(1 - config.clip, 1 + config.clip)
        assert difference(clamped, golden[f"ratio_{side}"]) < 1e-4
    ratios = torch.cat([golden["ratio_win"], golden["ratio_lose"]])
    clipped = (ratios - 1).abs() > config.clip * 0.9999
    assert float(metrics["clipped_fraction"].mean()) == pytest.approx(float(clipped.float().mean()))
