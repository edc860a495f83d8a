"""SPO's training step in SD 1.5's shape on a CPU, against the official algorithm: one pair, random weights.

`python -m benchmarks.step` prints the figures. Both sides in one process take more than 21 GB: it was stopped
there on a machine of 23 GB, and tried in tiny shapes only (`--tiny`).
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes, spo
from benchmarks.measure import Case, Result, compare
from benchmarks.models import SEED, Models
from benchmarks.official import Pairs
from spo.diffusion.noise import SampleNoise
from spo.methods.stepwise.batch import StepBatch
from spo.training import loop


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the same in tiny shapes")
    parser.add_argument("--rounds", type=int, default=1, help="1 without")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.tiny, arguments.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{result.name}: {result.ours_ms / 1000:.3g} s, {result.against} {result.other_ms / 1000:.3g} s, "
        f"ratio {result.ratio:.2f}, largest difference {result.difference:.1g}, peak of both {peak:.1f} GiB"
    )


def measure(tiny: bool, rounds: int) -> Result:
    models = shapes.load("sd15", shapes.tokenizer(), tiny, "cpu", torch.float32, small_model=True)
    return compare(case(models), rounds)


def case(models: Models) -> Case:
    """An update on one pair of random latents."""
    how = spo.settings(models, 1, batch_size=1)
    theirs = spo.Theirs(models, how, [])
    ours = spo.Ours(models, how)
    theirs.start = ours.start
    batch, pairs = _pair(models, how.num_inference_steps)

    def update_ours() -> Tensor:
        state = ours.state()
        loss = loop.update(ours.objective, [batch], state)["loss"]
        return spo.outcome(loss, ours.objective.parameters())

    def update_theirs() -> Tensor:
        loss = theirs.algorithm.update(pairs, theirs.optimizer())
        return spo.outcome(loss, theirs.algorithm.parameters())

    return Case("training step of a pair", spo.OFFICIAL, "step", 1, update_ours, update_theirs, 1e-4)


def _pair(models: Models, steps: int) -> tuple[StepBatch, Pairs]:
    """The same pair for both sides: x_t, and two latents near to it for the next step."""
    backbone: Any = models.backbone
    noise = SampleNoise(SEED, [0], backbone.latent_shape)
    x_t, win, lose = noise.draw(), noise.draw(), noise.draw()
    win, lose = x_t + 0.1 * win, x_t + 0.1 * lose
    prompts = models.some_prompts(1)
    text, timesteps = backbone.encode_prompts(prompts), models.schedule(steps).timesteps[steps // 2 :][:1]
    batch = StepBatch(
        x_t=x_t,
        timesteps=timesteps,
        conditioning=text,
        weight=torch.ones(1),
        prompts=prompts,
        x_win=win,
        x_lose=lose,
    )
    return batch, Pairs(x_t, timesteps, torch.stack([win, lose], dim=1), text)


if __name__ == "__main__":
    main()
