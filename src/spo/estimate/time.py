"""Time of a planned stage, from models with random weights on the device that is there.

Each model is timed on a few samples and multiplied by the samples of the plan. On a CPU a model whose
sample takes more than LARGE FLOPs is not built: its FLOPs are divided by the rate of one block of the UNet.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from spo.backbones import probe as base_probe
from spo.config import Params
from spo.estimate.plan import Plan
from spo.preference import probe as judge_probe
from spo.training import probe
from spo.training.compute import Work
from spo.training.probe import Run

MOST = 64  # samples of a timed call
LARGE = 1e11  # FLOPs of a sample on a CPU: about a second of a core
TIMED = {"cpu": 2e10, "cuda": 2e13}  # FLOPs of a timed call: a fraction of a second


class Estimate:
    """Of one stage on one device."""

    def __init__(
        self, params: Params, stage: str, variant: str | None, plan: Plan, device: str, checkpointing: bool
    ) -> None:
        self.params, self.plan, self.device = params, plan, device
        section = getattr(params.align, variant or "spo") if stage == "align" else None
        self.lora = section.lora if section else None
        self.full, self.checkpointing = section is not None and section.lora is None, checkpointing
        self._runs = self._built("meta")

    def _built(self, device: str) -> dict[str, Run]:
        """Each kind of work of the plan, on models that lie on `device`."""
        used = [kind for kind, count in asdict(self.plan.most).items() if count]
        models = base_probe.Models(self.params.backbone, self.lora, self.full, device)
        if self.checkpointing:
            models.unet.enable_gradient_checkpointing()
        runs = models.runs()
        if "judged" in used or "judged_trained" in used:
            heads = self.params.preference.trained == "heads"
            runs |= judge_probe.runs(self._judge(device), models.image_side, heads)
        return {kind: runs[kind] for kind in used}

    def _judge(self, device: str) -> Any:
        settings = self.params.preference
        return judge_probe.build(settings.init, settings.revision, settings.step_condition, device)

    def flops(self) -> dict[str, int]:
        """FLOPs of a sample of each kind of work."""
        return {kind: probe.flops(run) for kind, run in self._runs.items()}

    def seconds(self) -> dict[str, float]:
        """Seconds of a sample of each kind of work."""
        counted = self.flops()
        kind = torch.device(self.device).type
        small = {k for k, count in counted.items() if kind != "cpu" or count < LARGE}
        found = {}
        if small:
            runs = self._built(self.device) if small == set(counted) else self._only(small)
            for name in small:
                n = max(1, min(MOST, int(TIMED.get(kind, TIMED["cuda"]) // max(counted[name], 1))))
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


def hours(work: Work, seconds: dict[str, float]) -> float:
    return sum(count * seconds.get(kind, 0.0) for kind, count in asdict(work).items()) / 3600
