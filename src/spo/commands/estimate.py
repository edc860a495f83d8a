"""Time and peak memory of a planned stage, from models with random weights on the device that is there.

Time: each model is timed on a few samples and multiplied by the samples of the plan. On a CPU a model whose
sample takes more than LARGE FLOPs is not built: its FLOPs are divided by the rate of one block of the UNet.
Memory: weights, what is trained, and the most that a call keeps alive, counted on the meta device.
"""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spo.backbones import probe as base_probe
from spo.backbones.sizes import Sizes
from spo.commands.plan import Plan
from spo.config import Lora, Params
from spo.preference import probe as judge_probe
from spo.training import probe
from spo.training.compute import Work
from spo.training.probe import Run

LARGE = 1e11  # FLOPs of a sample on a CPU: about a second of a core
TIMED = {"cpu": 2e10, "cuda": 2e13}  # FLOPs of a timed call: a fraction of a second
OTHER_LIBRARIES = 220 * 2**20  # MLflow's client and open_clip, which a stage loads and a dry run does not
FP32, MOMENTS = 4, {True: 2, False: 8}  # bytes of a number; of AdamW's two moments by eight_bit


@dataclass(frozen=True)
class TrainedParts:
    """What a stage trains, as far as sizes depend on it."""

    lora: Lora | None = None  # of the UNet
    unet: bool = False  # the whole UNet
    checkpointed: bool = False
    eight_bit: bool = False


def trained(params: Params, stage: str, variant: str | None) -> TrainedParts:
    if stage != "align":
        return TrainedParts()
    section = getattr(params.align, variant or "spo")
    return TrainedParts(
        section.lora, section.lora is None, section.gradient_checkpointing, section.optimizer.eight_bit
    )


class Estimate:
    """Of one stage on one device."""

    def __init__(
        self, params: Params, stage: str, variant: str | None, plan: Plan, size: Sizes, device: str
    ) -> None:
        self.params, self.stage, self.variant, self.plan = params, stage, variant, plan
        self.size, self.device, self.trained = size, device, trained(params, stage, variant)
        self._runs = self._built("meta")

    def _built(self, device: str) -> dict[str, Run]:
        """Each kind of work of the plan, on models that lie on `device`."""
        used = [kind for kind, count in asdict(self.plan.most).items() if count]
        how = self.trained
        models = base_probe.Models(self.params.backbone, how.lora, how.unet, device)
        if how.checkpointed:
            models.unet.enable_gradient_checkpointing()
        runs = models.runs()
        if "judged" in used or "judged_trained" in used:
            heads = self.params.preference.trained == "heads"
            runs |= judge_probe.runs(self._judge(device), models.image_side, heads)
        return {kind: runs[kind] for kind in used}

    def _judge(self, device: str) -> Any:
        settings = self.params.preference
        return judge_probe.build(settings.init, settings.revision, settings.step_condition, device)

    # ---- time

    def seconds(self) -> dict[str, float]:
        """Seconds of a sample of each kind of work."""
        counted = {kind: probe.flops(run) for kind, run in self._runs.items()}
        kind = torch.device(self.device).type
        small = {k for k, count in counted.items() if kind != "cpu" or count < LARGE}
        found = {}
        if small:
            runs = self._built(self.device) if small == set(counted) else self._only(small)
            for name in small:
                most = self.plan.calls.get(name, 1)
                n = max(1, min(most, int(TIMED.get(kind, TIMED["cuda"]) // max(counted[name], 1))))
                found[name] = probe.seconds(runs[name], n, self.device)
        if small != set(counted):
            block = base_probe.first_attending_block(self.params.backbone, self.device)
            rate = probe.flops(block) / probe.seconds(block, 1, self.device)
            found |= {name: count / rate for name, count in counted.items() if name not in small}
        return found

    def _only(self, small: set[str]) -> dict[str, Run]:
        """The preference model where the base is too large to be built."""
        if small <= {"judged", "judged_trained"}:
            side = base_probe.image_side(self.params.backbone)
            heads = self.params.preference.trained == "heads"
            return judge_probe.runs(self._judge(self.device), side, heads)
        return self._built(self.device)

    # ---- memory

    def bytes(self) -> dict[str, int]:
        """The terms of the peak."""
        width = {"fp32": 4, "bf16": 2, "fp16": 2}[self.params.backbone.dtype]
        text = base_probe.parameters_of_text(self.params.backbone)
        terms = {
            "libraries": _libraries() if torch.device(self.device).type == "cpu" else 0,
            "base": width * (self.size.unet_parameters + self.size.vae_parameters + text),
            "preference model": self._judge_bytes(width, text),
            "training": self._training_bytes(),
        }
        alive = {
            kind: probe.live_bytes(run, self.plan.calls.get(kind, 1)) for kind, run in self._runs.items()
        }
        terms["largest call"] = max(alive.values())
        return terms

    def _judge_bytes(self, width: int, text: int) -> int:
        """The preference model of a stage; where it is trained, in fp32 with AdamW and an average."""
        most, settings = self.plan.most, self.params.preference
        if most.judged or most.judged_trained:
            model = self._judge("meta")
            count = sum(p.numel() for p in model.parameters())
            if not most.judged_trained:
                return FP32 * count
            if settings.trained == "heads":
                model.train_heads()
            learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
            return FP32 * count + self._state(learned, settings.optimizer.eight_bit, bool(settings.ema))
        if not most.down and not most.down_trained:
            return 0
        count = base_probe.down_parameters(self.params.backbone) + text
        latent = self.params.latent_preference
        if not most.down_trained or latent.trained != "all":
            return width * count
        return FP32 * count + self._state(count, latent.optimizer.eight_bit, bool(latent.ema))

    def _training_bytes(self) -> int:
        """Weights of an adapter, or the UNet's in fp32, and AdamW's; gradients are in the largest call."""
        from spo.backbones import sizes

        how = self.trained
        if how.unet:
            count = self.size.unet_parameters
        elif how.lora is not None:
            count = sizes.lora_parameters(self.params.backbone, how.lora)
        else:
            return 0
        return FP32 * count + self._state(count, how.eight_bit, False)

    @staticmethod
    def _state(count: int, eight_bit: bool, average: bool) -> int:
        return (MOMENTS[eight_bit] + FP32 * average) * count


def _libraries() -> int:
    """Bytes of this process, which has loaded what a stage computes with, and of what it loads beside."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() + OTHER_LIBRARIES


def hours(work: Work, seconds: dict[str, float]) -> float:
    return sum(count * seconds.get(kind, 0.0) for kind, count in asdict(work).items()) / 3600
