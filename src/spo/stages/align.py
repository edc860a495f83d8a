"""Stage `align`: fine-tune the base model by one method; joins method, backbone and training loop."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params
from spo.evaluation import validation
from spo.runtime.files import write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import METRICS, SCRATCH, TRAINING
from spo.stages.common import stage
from spo.tracking.curve import Curve

if TYPE_CHECKING:
    from spo.types import Backbone, Method

OUTPUT = Path("outputs/align")
CODE = (  # that trains, and that judges on the way
    *("backbones", "data", "diffusion", "evaluation/generation.py", "evaluation/scoring.py"),
    *("evaluation/validation.py", "methods", "preference", "rewards", "training", "types.py"),
)


def run(params: Params, item: str) -> None:
    from spo import backbones
    from spo.evaluation import model_card
    from spo.methods import method_spec
    from spo.training import distributed, loop, optimizer
    from spo.training.alignment import Alignment
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

    section = getattr(params.align, item)
    optimizer.check(section.optimizer)
    with stage("align", params, item) as tracked:
        started = time.monotonic()
        backbone = backbones.load(params.backbone, device())
        if section.lora is None:
            backbone.train_fully()
        else:
            backbone.add_lora(section.lora, params.seed)
        if section.gradient_checkpointing:
            backbone.checkpoint_gradients()
        method = method_spec(item).build(params, backbone)
        scratch = _scratch(params, item)
        curve = Curve(tracked, scratch)
        try:
            summary = loop.fit(
                Alignment(f"align.{item}", backbone, method),
                section.optimizer,
                checkpoints=CheckpointStore(scratch / "checkpoints"),
                checkpoint_every=section.checkpoint_every,
                on_metrics=curve.log,
                watch=_watch(params, item, backbone, method, curve, scratch),
                scale_loss=params.backbone.dtype == "fp16",
            )
        except validation.Collapse:
            _show(tracked, scratch / "samples")
            raise
        if not distributed.is_main_process():
            return
        curve.write(TRAINING / f"{item}.csv")
        folder = OUTPUT / item
        shutil.rmtree(folder, ignore_errors=True)
        _save(backbone, section.lora is None, folder)
        model_card.write(folder, params, item, summary)
        if (scratch / "samples").exists():
            shutil.copytree(scratch / "samples", folder / "samples")
            _show(tracked, folder / "samples")
        seconds = round(time.monotonic() - started, 1)
        write_json(METRICS / f"align_{item}.json", {**summary, "seconds": seconds})
        if section.lora is None:  # too large to be stored twice: DVC has it
            tracked.set_tags({"model": str(folder)})
        else:
            tracked.log_artifact(folder / "pytorch_lora_weights.safetensors", "adapter")
        shutil.rmtree(scratch, ignore_errors=True)


def _save(backbone: Any, whole: bool, folder: Path) -> None:
    if whole:
        backbone.save_pipeline(folder)
    else:
        backbone.save_lora(folder)


def _show(tracked: Any, samples: Path) -> None:
    """The validation pictures before, during and after training, as artifacts named by the update."""
    for picture in sorted(samples.glob("*.png")):
        tracked.log_artifact(picture, "samples")


def _watch(
    params: Params, item: str, backbone: Backbone, method: Method, curve: Curve, scratch: Path
) -> validation.Watch | None:
    section = getattr(params.align, item)
    settings = section.validation
    if settings is None:
        return None
    return validation.Watch(
        settings,
        judge=lambda: validation.judged(backbone, params, settings, item),
        keep=lambda folder: _save(backbone, section.lora is None, folder),
        curve=curve,
        scratch=scratch,
        name=f"align.{item}",
        iterations=method.iterations,
    )


def _scratch(params: Params, item: str) -> Path:
    from spo.methods import method_spec

    inputs = [Path(p) for p in (*method_spec(item).reads, "outputs/inputs/base.json")]
    section = getattr(params.align, item)
    sections = [item, params.seed, params.backbone, section]
    if section.validation is not None:  # what was at the start is kept there
        inputs.append(validation.PROMPTS)
        sections += validation.sections(params)
    return SCRATCH / "resume" / f"align-{item}-{fingerprint(sections, inputs, CODE)}"
