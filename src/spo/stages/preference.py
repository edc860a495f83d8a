"""Stage `preference`: train a preference model, or take a released one, and measure it by timestep.

Without an item it is the step-aware preference model (SPM), SPO's reward model; `latent` is the latent reward
model, LPO's. The SPM's two baselines (the same CLIP without the step condition; the same CLIP
trained on clean images only) are stages of their own, whose accuracies are committed to git: they run again
only when their inputs or code change.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import PREFERENCE_BASELINES, LatentPreference, Params, Preference
from spo.runtime import released
from spo.runtime.files import read_text, remove, write_json, write_text
from spo.runtime.fingerprint import resume_folder
from spo.runtime.hub import split_revision
from spo.runtime.workspace import METRICS, TRAINING
from spo.stages.common import NO_ACCURACY, NO_CURVE, NOTHING, stage, write_nothing
from spo.tracking.curve import Curve
from spo.tracking.records import Run

if TYPE_CHECKING:
    from spo.data.latents import EncodedPairs
    from spo.preference.latent_training import LatentTask
    from spo.preference.step_aware import StepAwareTask
    from spo.preference.trainer import PreferenceTask
    from spo.training.clock import Clock
    from spo.types import Backbone

# of the models that later stages read
OUTPUTS = {None: Path("outputs/preference"), "latent": Path("outputs/preference_latent")}
PAIRS = Path("outputs/pairs")
VALIDATION_PROMPTS = Path("outputs/prompts/validation.txt")
# the code that trains
CODE = ("backbones", "data", "diffusion", "preference", "training", "types.py")


def run(params: Params, item: str | None = None) -> None:
    """Train the SPM, or with `item` the latent reward model or one of the SPM's baselines."""
    from spo import backbones
    from spo.training import budget, distributed
    from spo.training.clock import Clock
    from spo.training.distributed import device

    name = f"preference_{item}" if item else "preference"
    kind = "latent_preference" if item == "latent" else "preference"
    with stage("preference", params, item) as tracked:
        if why := released.unused(kind) or _nothing(params, item):
            files = {METRICS / f"{name}.json": NO_ACCURACY}
            files |= {TRAINING / f"{name}.csv": NO_CURVE} if item in OUTPUTS else {}
            write_nothing(name, why, [OUTPUTS[item]] if item in OUTPUTS else [], files)
            return
        clock = Clock()
        update = PREFERENCE_BASELINES.get(item or "", {})
        settings: Preference | LatentPreference = getattr(params, kind).model_copy(update=update)
        backbone = backbones.load(params.backbone, device(), budget.of(params, kind))
        if settings.pretrained is not None:
            _take(params, settings, backbone, tracked, OUTPUTS[item])
            return
        scratch = _scratch(params, settings, name)
        curve = Curve(tracked, scratch)
        task: PreferenceTask
        if isinstance(settings, LatentPreference):
            task = _latent(params, settings, backbone)
        else:
            task = _step_aware(params, settings, backbone)
        report = _train(params, task, scratch, curve, clock)
        if not distributed.is_main_process():
            return
        curve.write(TRAINING / f"{name}.csv" if item in OUTPUTS else None)
        if item in OUTPUTS:
            remove(OUTPUTS[item])
            task.save(OUTPUTS[item])
        write_json(METRICS / f"{name}.json", {**report, "seconds": round(clock.seconds, 1)})
        if item in OUTPUTS:
            tracked.log_model(OUTPUTS[item], "preference model", settings.steps, "accuracy/")
        shutil.rmtree(scratch, ignore_errors=True)


def _nothing(params: Params, item: str | None) -> str | None:
    """Why a baseline is not trained; None if it is, and for the other models."""
    if item in PREFERENCE_BASELINES and params.preference.pretrained:
        return "it compares with a model that is trained, but preference.pretrained is set"
    return None


def _take(
    params: Params, settings: Preference | LatentPreference, backbone: Backbone, tracked: Run, output: Path
) -> None:
    """Check a released model, measure it, and write it as if it were trained here."""
    from spo.data.latents import latent_pairs
    from spo.preference import released as models
    from spo.training import distributed

    kind = "latent_preference" if isinstance(settings, LatentPreference) else "preference"
    given = released.fetch(kind)
    pairs = None if (PAIRS / NOTHING).exists() else latent_pairs(params, backbone, "validation")
    backbone.remember_prompts(pairs.captions if pairs is not None else [])
    task = models.task(settings, given.path, backbone)
    measured: dict[str, Any] = {"accuracy": {}, "n": 0}
    if pairs is not None:
        measured = _accuracy(params, task, pairs)
    elif distributed.is_main_process():
        print(f"spo: {kind}: no pairs to measure it on: pairs.source is null", file=sys.stderr)
    measured |= _ranked(params, task)
    if not distributed.is_main_process():
        return
    remove(output)
    task.save(output)
    write_text(TRAINING / f"{output.name}.csv", NO_CURVE)
    # what its training cost here
    measured |= {
        "seconds": 0,
        "training_seconds": 0,
        "unet_samples": 0,
        "pretrained": given.origin["reference"],
    }
    write_json(METRICS / f"{output.name}.json", measured)
    tracked.set_tags(given.tags())
    tracked.log_model(output, "preference model", 0, "accuracy/")


def _step_aware(params: Params, settings: Preference, backbone: Backbone) -> StepAwareTask:
    import torch

    from spo.preference.model import StepAwarePreferenceModel, load_tokenizer
    from spo.preference.step_aware import StepAwareTask

    schedule = backbone.schedule(settings.num_inference_steps)
    schedule = schedule.to(backbone.device)
    own = settings.init, settings.revision
    tokenizer = load_tokenizer(*(split_revision(settings.tokenizer) if settings.tokenizer else own))
    torch.manual_seed(params.seed)  # the timestep embedding is drawn at random
    model = StepAwarePreferenceModel.from_clip(settings.init, settings.step_condition, settings.revision)
    if settings.logit_scale is not None:
        model.set_logit_scale(settings.logit_scale)
    return StepAwareTask(model.to(backbone.device), tokenizer, backbone, schedule, settings)


def _latent(params: Params, settings: LatentPreference, backbone: Backbone) -> LatentTask:
    import torch

    from spo.data.weights import load_clip
    from spo.preference.latent import LatentPreferenceModel
    from spo.preference.latent_training import LatentTask

    schedule = backbone.schedule(settings.num_inference_steps)
    torch.manual_seed(params.seed)  # the visual projection is drawn at random
    model = LatentPreferenceModel(backbone.feature_model(), settings.feature_guidance)
    if settings.text_projection is not None:
        key = "latent_preference.text_projection"
        clip = load_clip(settings.text_projection, settings.revision, key)
        model.start_text_projection(clip.text_projection.weight, settings.text_projection)
    return LatentTask(model, backbone, schedule.to(backbone.device), settings, params.seed)


def _train(params: Params, task: PreferenceTask, scratch: Path, curve: Curve, clock: Clock) -> dict[str, Any]:
    """Train the model; returns its accuracy by timestep on validation pairs, and facts."""
    from spo.data.latents import latent_pairs
    from spo.preference import trainer
    from spo.preference.compute import unet_samples
    from spo.training.checkpoint import CheckpointStore

    settings = task.settings
    pairs = {part: latent_pairs(params, task.backbone, part) for part in ("train", "validation")}
    pairs["train"], facts = _labelled(pairs["train"], settings)
    task.backbone.remember_prompts(pairs["validation"].captions)
    summary = trainer.train(
        task,
        pairs["train"],
        seed=params.seed,
        checkpoint=CheckpointStore(scratch / "checkpoints"),
        on_metrics=curve.log,
        on_resume=curve.resume,
        clock=clock,
        # the step-aware model computes in fp32 whatever the base's precision
        scale_loss=isinstance(settings, LatentPreference) and params.backbone.dtype == "fp16",
    )
    task.finish()
    facts |= _ranked(params, task)
    return {
        **_accuracy(params, task, pairs["validation"]),
        "n_train": len(pairs["train"]),
        **{k: summary[k] for k in ("updates", "skipped_updates", "training_seconds") if k in summary},
        "unet_samples": unet_samples(params.backbone.classifier_free(settings)),
        **facts,
    }


def _accuracy(params: Params, task: PreferenceTask, pairs: EncodedPairs) -> dict[str, Any]:
    from spo.preference import trainer

    measured = trainer.evaluate(task, pairs, task.settings.eval_timesteps, seed=params.seed)
    accuracy = {str(t): round(m["accuracy"], 4) for t, m in measured.items()}
    return {"accuracy": accuracy, "n": int((pairs.label_0 != 0.5).sum())}


def _ranked(params: Params, task: PreferenceTask) -> dict[str, Any]:
    return {"local": _candidate_ranking(params, task)} if task.settings.local_prompts else {}


def _labelled(
    pairs: EncodedPairs, settings: Preference | LatentPreference
) -> tuple[EncodedPairs, dict[str, Any]]:
    """The training pairs with the labels that the settings name, and facts about them."""
    if isinstance(settings, LatentPreference) or settings.labels is None:
        return pairs, {}
    from spo.data.pairs import FACTS, read_labels

    labels, facts = read_labels(PAIRS, len(pairs))
    return replace(pairs, label_0=labels), {FACTS: facts}


def _candidate_ranking(params: Params, task: PreferenceTask) -> dict[str, float]:
    """Correlation with the oracle within the candidates of a step, by timestep."""
    from spo.evaluation.candidate_ranking import candidate_ranking
    from spo.scenes.oracle import Oracle

    settings, section = task.settings, task.name
    if params.score.oracle is None:
        raise ValueError(f"{section}.local_prompts: needs score.oracle, which only scenes has; set it to 0")
    prompts = read_text(VALIDATION_PROMPTS, "validation prompts").splitlines()
    if len(prompts) < settings.local_prompts:
        raise ValueError(
            f"{section}.local_prompts: {settings.local_prompts} is more than the {len(prompts)} prompts of "
            f"{VALIDATION_PROMPTS}"
        )
    by_timestep = candidate_ranking(
        task.backbone,
        task.reward_model(),
        Oracle(params.score.oracle),
        prompts[: settings.local_prompts],
        steps=settings.num_inference_steps,
        guidance=settings.guidance,
        seed=params.seed,
    )
    return {str(t): round(value, 4) for t, value in by_timestep.items()}


def _scratch(params: Params, settings: Preference | LatentPreference, name: str) -> Path:
    # the name, because two stages with equal settings may run at the same time
    sections = (name, params.seed, params.backbone, params.pairs.latents, settings)
    pinned = "latent" if isinstance(settings, LatentPreference) else "clip"
    inputs = [Path(p) for p in ("outputs/pairs", "outputs/inputs/base.json", f"outputs/inputs/{pinned}.json")]
    return resume_folder("preference", sections, inputs, CODE)
