"""Stage `align`: fine-tune the base model by one method, or take released weights in place of it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Lora, Params
from spo.runtime import released
from spo.runtime.files import remove, write_json, write_text
from spo.runtime.fingerprint import resume_folder
from spo.runtime.processes import is_main_process
from spo.runtime.released import Released
from spo.runtime.workspace import METRICS, TRAINING
from spo.stages.common import NO_CURVE, NO_METRICS, stage, write_nothing
from spo.tracking.curve import Curve
from spo.tracking.records import Run
from spo.validation import images
from spo.validation.saved_model import FACTS
from spo.validation.watch import Collapse, Watch

if TYPE_CHECKING:
    from spo.training.alignment import Alignment

OUTPUT = Path("outputs/align")
ADAPTER = "pytorch_lora_weights.safetensors"
LATENTS_OF = Path("outputs/pairs/train")  # read by methods that train on pairs.latents
# what trains, and what validates meanwhile
CODE = (
    "backbones",
    "data",
    "diffusion",
    "methods",
    "preference",
    "rewards",
    "scenes",
    "training",
    "types.py",
    "validation",
)


def run(params: Params, method: str) -> None:
    """Fine-tune the base model by `method`, a section of `align`."""
    from spo import backbones
    from spo.methods import method_spec
    from spo.publish import card
    from spo.training import budget, distributed, loop, optimizer
    from spo.training.alignment import Alignment, make_trainable
    from spo.training.checkpoint import CheckpointStore
    from spo.training.clock import Clock
    from spo.training.distributed import device

    section = getattr(params.align, method)
    if section is None or section.pretrained is not None:
        _without_training(params, method)
        return
    optimizer.check(section.optimizer)
    with stage("align", params, method) as tracked:
        clock = Clock()
        backbone = backbones.load(params.backbone, device(), budget.of(params, method))
        spec = method_spec(method)
        built = spec.build(params, backbone)  # of the backbone without an adapter
        make_trainable(backbone, section.lora, params.seed)
        objective = Alignment(f"align.{method}", backbone, built)
        scratch = _scratch(params, method)
        curve = Curve(tracked, scratch)
        result = Result(OUTPUT / method, backbone, section.lora, tracked)
        watch = _watch(params, method, objective, result, curve, scratch)

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
                ended=lambda: watch is not None and watch.ended is not None,
                clock=clock,
                scale_loss=params.backbone.dtype == "fp16",
                sampler_ema=spec.sampler_ema(section),
            )
        except Collapse:
            if watch and distributed.is_main_process():
                result.log_last_good(watch)
            raise
        if not distributed.is_main_process():
            return
        curve.write(TRAINING / f"{method}.csv")
        iterations, cost = summary["iterations"], spec.cost(params, backbone.schedule)
        facts = result.write(watch, scratch)
        if watch and watch.ended:
            facts["ended"] = watch.ended
            print(f"{objective.name}: ended at iteration {iterations}: {watch.ended}", file=sys.stderr)
        card.write(result.folder, params, method, {**summary, **facts})
        computed = round(cost.unet_samples * iterations / objective.iterations)
        summary |= {"unet_samples": computed, **facts}
        write_json(METRICS / f"align_{method}.json", {**summary, "seconds": round(clock.seconds, 1)})
        result.log(result.folder, int(summary.get("selected_iteration", iterations)))
        if section.lora is not None:  # of a pipeline DVC has the only copy, since it is large
            tracked.log_artifact(OUTPUT / method / ADAPTER, "adapter")
        shutil.rmtree(scratch, ignore_errors=True)


def _without_training(params: Params, method: str) -> None:
    """Write released weights, or that the method is not in the experiment."""
    folder, key = OUTPUT / method, f"align.{method}"
    files = {METRICS / f"align_{method}.json": NO_METRICS, TRAINING / f"{method}.csv": NO_CURVE}
    with stage("align", params, method) as tracked:
        if getattr(params.align, method) is None:
            write_nothing(f"align {method}", f"{key} is null", [folder], files)
        elif is_main_process():
            given = released.fetch(key)
            _take(params, method, given, folder, tracked)
            for path, text in files.items():
                write_text(path, text)


def _take(params: Params, method: str, given: Released, folder: Path, tracked: Run) -> None:
    """Check released weights against the base, and write them with their card."""
    from spo import adapters
    from spo.publish import card
    from spo.training.distributed import device

    remove(folder)
    kind = adapters.adopt(params.backbone, given.path, folder, device())
    card.write(folder, params, method, {}, origin=given.origin, lora=kind == "lora")
    tracked.set_tags(given.tags())
    if kind == "lora":
        tracked.log_artifact(folder / ADAPTER, "adapter")
    tracked.log_model(*((folder / ADAPTER, "adapter") if kind == "lora" else (folder, "pipeline")), 0, "")


@dataclass(frozen=True)
class Result:
    """The results of a training: its output folder, and the models that are logged."""

    folder: Path
    backbone: Any
    lora: Lora | None  # None: the whole UNet is trained, and saved as a pipeline
    tracked: Run

    def save(self, folder: Path) -> None:
        from spo.training.alignment import save

        save(self.backbone, self.lora, folder)

    def write(self, watch: Watch | None, scratch: Path) -> dict[str, Any]:
        """Write the last or the selected weights, and the validation images; returns what was selected."""
        remove(self.folder)
        selected = watch.selected() if watch else None
        best = watch.best.path() if watch and selected is not None else None
        if best is not None:
            shutil.copytree(best, self.folder, ignore=shutil.ignore_patterns(FACTS))
        else:
            self.save(self.folder)
        if (scratch / "samples").exists():
            shutil.copytree(scratch / "samples", self.folder / "samples", ignore=shutil.ignore_patterns(".*"))
        return {f"selected_{name}": value for name, value in (selected or {}).items()}

    def log(self, folder: Path, iteration: int) -> None:
        """Log the weights in a folder, those of an iteration, with the scores of their validation."""
        path, kind = (folder, "pipeline") if self.lora is None else (folder / ADAPTER, "adapter")
        self.tracked.log_model(path, kind, iteration, "validation/")

    def log_last_good(self, watch: Watch) -> None:
        """Log the models of a collapsed training: the last good one and, with `select`, the best."""
        for saved in (watch.good, watch.best):
            if path := saved.path():
                self.log(path, saved.facts()["iteration"])


def _watch(
    params: Params, method: str, objective: Alignment, result: Result, curve: Curve, scratch: Path
) -> Watch | None:
    from spo.methods import method_spec
    from spo.training.distributed import device
    from spo.validation.scorers import Scorers

    section, backbone = getattr(params.align, method), objective.backbone
    settings = section.validation
    if settings is None:
        return None
    scorers = Scorers(params, device())
    return Watch(
        settings,
        validate=lambda: images.validate(backbone, params, settings, method, scorers),
        save=result.save,
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
        inputs.append(images.PROMPTS)
        sections += images.sections(params)
    return resume_folder(f"align-{method}", sections, inputs, CODE)
