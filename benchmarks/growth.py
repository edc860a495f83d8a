"""How time and memory grow with prompts, candidates, image side and stored pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import spo
from benchmarks.measure import timed
from benchmarks.models import SEED, Models
from spo.data.latents import EncodedPairs
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.spo import SpoMethod
from spo.preference.model import ClipRewardModel
from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.state import TrainingState

MB = 2**20
SIZES: Mapping[str, Sequence[int]] = {
    "prompts": (4, 8, 16, 32),
    "candidates": (2, 4, 8, 16),
    "image side": (48, 64, 96),
    "stored pairs": (500, 5_000, 50_000),
}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Curve:
    """CPU seconds, and MB of live tensors at the peak, at several sizes."""

    name: str
    what: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    megabytes: Sequence[float]

    @property
    def exponent(self) -> float:
        """p of seconds = c * size^p, least squares on logarithms."""
        return _slope(self.sizes, self.seconds)

    @property
    def memory_exponent(self) -> float:
        return _slope(self.sizes, self.megabytes)


def _slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def curves(models: Models, sizes: Mapping[str, Sequence[int]] = SIZES) -> list[Curve]:
    """A rollout of few denoising steps against prompts, candidates and image side; an update of Diffusion-DPO
    against the number of stored pairs."""
    changes = {"num_inference_steps": 4, "divert_start_step": 2}
    base = spo.settings(models, 4, **changes)
    backbone = models.backbone
    channels, side, _ = backbone.latent_shape
    factor = backbone.image_size[0] // side

    def with_prompts(n: int) -> Run:
        return _rollout(models, base.model_copy(update={"prompts_per_iteration": n}))

    def with_candidates(k: int) -> Run:
        return _rollout(models, base.model_copy(update={"candidates": k}))

    def with_side(pixels: int) -> Run:
        backbone.latent_shape = (channels, pixels // factor, pixels // factor)
        return _rollout(models, base)

    making = {"prompts": with_prompts, "candidates": with_candidates, "image side": with_side}
    found = [_curve(name, "rollout", sizes[name], make) for name, make in making.items()]
    backbone.latent_shape = (channels, side, side)
    return [*found, _stored_pairs(models, sizes["stored pairs"])]


def _rollout(models: Models, how: Any) -> Run:
    reward_model = ClipRewardModel(models.spm, models.tokenizer)
    schedule = models.schedule(how.num_inference_steps)
    method = SpoMethod(how, schedule, reward_model, models.prompts, SEED)
    return lambda: method.collect(models.backbone, 0)


def _curve(name: str, what: str, sizes: Sequence[int], make: Callable[[int], Run]) -> Curve:
    measured = [_measured(make(size)) for size in sizes]
    return Curve(name, what, sizes, [m[0] for m in measured], [m[1] for m in measured])


def _measured(run: Run) -> tuple[float, float]:
    """CPU seconds (the least of two) and MB of memory added at the peak."""
    peak = peak_of(run)
    return min(timed(run)[0] for _ in range(2)), peak


def peak_of(run: Run) -> float:
    """MB that live tensors add at the most while it runs, as torch's own allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    results: Any = recorded.profiler
    live = highest = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest / MB


def _stored_pairs(models: Models, sizes: Sequence[int]) -> Curve:
    settings = models.params.align.section("diffusion_dpo")
    assert settings.lora is not None
    backbone = models.backbone
    backbone.add_lora(settings.lora, SEED)
    with tempfile.TemporaryDirectory() as folder:

        def make(count: int) -> Run:
            pairs = synthetic_pairs(Path(folder) / str(count), count, backbone.latent_shape)
            method = DiffusionDpoMethod(settings, models.schedule(20), pairs, SEED)
            objective = Alignment("align.diffusion_dpo", backbone, method)
            state = TrainingState(objective.parameters(), settings.optimizer, 0.0, False)

            def run() -> None:
                (parts,), _ = objective.collect(state.updates)
                loop.update(objective, parts, state)

            return run

        return _curve("stored pairs", "Diffusion-DPO update", sizes, make)


def synthetic_pairs(path: Path, count: int, shape: tuple[int, ...]) -> EncodedPairs:
    """`count` pairs of random latents in a memory-mapped file, written a thousand at a time."""
    latents = np.memmap(path, np.float16, "w+", shape=(count, 2, *shape))
    drawn = np.random.default_rng(SEED)
    for start in range(0, count, 1000):
        part = latents[start : start + 1000]
        part[:] = drawn.standard_normal(part.shape, dtype=np.float32)
    latents.flush()
    stored = np.memmap(path, np.float16, "r", shape=latents.shape)
    labels = torch.arange(count).remainder(2).float()
    return EncodedPairs(stored, [f"circle {i % 7}" for i in range(count)], labels, torch.ones(count))


def plot(found: Sequence[Curve], path: Path) -> None:
    """Seconds and MB over sizes, on logarithmic axes, with the fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.2 * len(found), 5.6), layout="constrained")
    for column, curve in enumerate(found):
        time = (curve.seconds, curve.exponent, "s of CPU time")
        memory = (curve.megabytes, curve.memory_exponent, "MB")
        for axis, (values, exponent, unit) in zip(axes[:, column], (time, memory), strict=True):
            axis.loglog(curve.sizes, values, "o-")
            axis.minorticks_off()
            axis.set_xticks(curve.sizes, [f"{size:,}" for size in curve.sizes], fontsize=7)
            axis.set_yticks(values, [f"{value:.3g}" for value in values], fontsize=7)
            axis.set_title(f"{curve.what}: exponent {exponent:.2f}", fontsize=9)
            axis.set_xlabel(curve.name)
            axis.set_ylabel(unit)
            axis.set_ylim(min(values) / 2, max(values) * 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
