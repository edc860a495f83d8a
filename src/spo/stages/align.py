"""Stage `align`: fine-tune the base model by one method; joins method, backbone and training loop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params
from spo.evaluation import validation
from spo.runtime.files import read_json, remove, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import METRICS, SCRATCH, TRAINING
from spo.stages.common import stage
from spo.tracking.curve import Curve
from spo.tracking.records import Run

if TYPE_CHECKING:
    from spo.training.alignment import Alignment

OUTPUT = Path("outputs/align")
ADAPTER = "pytorch_lora_weights.safetensors"
LATENTS_OF = Path("outputs/pairs/train")  # read by methods that train on pairs.latents
CODE = (  # that trains, and that judges on the way
    *("backbones", "data", "diffusion", "evaluation/generation.py", "evaluation/scorers.py"),
    *(
        "evaluation/scoring.py",
        "evaluation/validation.py",
        "methods",
        "preference",
        "rewards",
        "training",
        "types.py",
    ),
)


def run(params: Params, method: str) -> None:
    """Fine-tune the base model by `method`, a section of `align`."""
    from spo import backbones
    from spo.methods import method_spec
    from spo.training import budget, distributed, loop, optimizer
    from spo.training.alignment import Alignment
    from spo.training.checkpoint import CheckpointStore
    from spo.training.clock import Clock
    from spo.training.distributed import device

    section = getattr(params.align, method)
    optimizer.check(section.optimizer)
    with stage("align", params, method) as tracked:
        clock = Clock()
        backbone = backbones.load(params.backbone, device(), budget.of(params, method))
        spec = method_spec(method)
        built = spec.build(params, backbone)  # of the backbone without an adapter
        _make_trainable(backbone, section, params.seed)
        objective = Alignment(f"align.{method}", backbone, built)
        scratch = _scratch(params, method)
        curve = Curve(tracked, scratch)
        watch = _watch(params, method, objective, curve, scratch)

        def resume(iteration: int) -> None:
            if watch:
                watch.resume(iteration)
            curve.resume(iteration)

        try:
            summary = loop.fit(
                objective,
                section.optimizer,
                checkpoints=CheckpointStore(scratch / "checkpoints"),
                checkpoint_every=section.checkpoint_every,
                on_metrics=curve.log,
                on_resume=resume,
                watch=watch,
                clock=clock,
                scale_loss=params.backbone.dtype == "fp16",
                sampler_ema=spec.sampler_ema(section),
            )
        except validation.Collapse:
            if watch and distributed.is_main_process():
                _log_last_good(tracked, watch, section.lora is None)
            raise
        if not distributed.is_main_process():
            return
        curve.write(TRAINING / f"{method}.csv")
        cost = spec.cost(params, backbone.scheduler_config)
        summary |= {
            "unet_samples": cost.unet_samples,
            **_write(params, method, backbone, watch, summary, scratch),
        }
        write_json(METRICS / f"align_{method}.json", {**summary, "seconds": round(clock.seconds, 1)})
        iteration = int(summary.get("selected_iteration", objective.iterations))
        _log_model(tracked, OUTPUT / method, section.lora is None, iteration)
        if section.lora is not None:  # a whole model is too large to be stored twice: DVC has it
            tracked.log_artifact(OUTPUT / method / ADAPTER, "adapter")
        shutil.rmtree(scratch, ignore_errors=True)


def _make_trainable(backbone: Any, section: Any, seed: int) -> None:
    if section.lora is None:
        backbone.train_fully()
    else:
        backbone.add_lora(section.lora, seed)
    if backbone.budget.checkpointing:
        backbone.checkpoint_gradients()


def _write(
    params: Params,
    method: str,
    backbone: Any,
    watch: validation.Watch | None,
    summary: dict[str, Any],
    scratch: Path,
) -> dict[str, Any]:
    """Write the output folder: weights (the last or the selected ones), model card and validation images.

    Returns:
        Which validated weights were selected, if any were.
    """
    from spo.evaluation import model_card

    folder, full = OUTPUT / method, getattr(params.align, method).lora is None
    remove(folder)
    selected = watch.selected() if watch else None
    if watch and selected is not None:
        shutil.copytree(watch.best, folder, ignore=shutil.ignore_patterns(validation.MARK))
    else:
        _save(backbone, full, folder)
    facts = {f"selected_{name}": value for name, value in (selected or {}).items()}
    model_card.write(folder, params, method, {**summary, **facts})
    if (scratch / "samples").exists():
        shutil.copytree(scratch / "samples", folder / "samples", ignore=shutil.ignore_patterns(".*"))
    return facts


def _save(backbone: Any, full: bool, folder: Path) -> None:
    if full:
        backbone.save_pipeline(folder)
    else:
        backbone.save_lora(folder)


def _log_model(tracked: Run, folder: Path, full: bool, iteration: int) -> None:
    """Log the weights in a folder, those of an iteration, with the scores of their validation."""
    path, kind = (folder, "pipeline") if full else (folder / ADAPTER, "adapter")
    tracked.log_model(path, kind, iteration, "validation/")


def _log_last_good(tracked: Run, watch: validation.Watch, full: bool) -> None:
    """Log the models that a collapsed training leaves: the last good one and, with `select`, the best."""
    for folder in (watch.good, watch.best):
        if (folder / validation.MARK).exists():
            iteration = read_json(folder / validation.MARK, "saved model")["iteration"]
            _log_model(tracked, folder, full, iteration)


def _watch(
    params: Params, method: str, objective: Alignment, curve: Curve, scratch: Path
) -> validation.Watch | None:
    from spo.evaluation.scorers import Scorers
    from spo.methods import method_spec
    from spo.training.distributed import device

    section, backbone = getattr(params.align, method), objective.backbone
    settings = section.validation
    if settings is None:
        return None
    scorers = Scorers(params, device())
    return validation.Watch(
        settings,
        validate=lambda: validation.validate(backbone, params, settings, method, scorers),
        save=lambda folder: _save(backbone, section.lora is None, folder),
        curve=curve,
        scratch=scratch,
        name=objective.name,
        iterations=objective.iterations,
        divergence=method_spec(method).divergence,
    )


def _scratch(params: Params, method: str) -> Path:
    from spo.methods import method_spec

    inputs = [Path(p) for p in (*method_spec(method).reads, "outputs/inputs/base.json")]
    section = getattr(params.align, method)
    sections = [method, params.seed, params.backbone, section]
    if LATENTS_OF in inputs:
        sections.append(params.pairs.latents)
    if section.validation is not None:  # the scores at the start are stored there
        inputs.append(validation.PROMPTS)
        sections += validation.sections(params)
    return SCRATCH / "resume" / f"align-{method}-{fingerprint(sections, inputs, CODE)}"
