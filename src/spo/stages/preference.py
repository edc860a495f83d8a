"""Stage `preference`: train the step-aware preference model (SPM) and measure it by timestep.

Its two baselines (the same CLIP without the step condition; the same CLIP trained on clean images only) are
stages of their own, whose accuracies are committed to git: they run again only when their inputs or code
change.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params, Preference
from spo.runtime.files import require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import METRICS, SCRATCH, TRAINING
from spo.stages.common import stage
from spo.tracking.curve import Curve

if TYPE_CHECKING:
    from spo.preference.trainer import Setup
    from spo.types import Backbone

OUTPUT = Path("outputs/preference")
VALIDATION_PROMPTS = Path("outputs/prompts/validation.txt")
# the code that trains
CODE = ("backbones", "data", "diffusion", "preference", "rewards", "training", "types.py")
BASELINES: dict[str, dict[str, bool]] = {
    "unconditioned": {"step_condition": False},
    "clean_only": {"step_condition": False, "noised": False},
}


def run(params: Params, item: str | None = None) -> None:
    """Train the SPM, or with `item` one of its BASELINES."""
    from spo import backbones
    from spo.training import distributed
    from spo.training.distributed import device

    settings = params.preference.model_copy(update=BASELINES[item] if item else {})
    name = f"preference_{item}" if item else "preference"
    with stage("preference", params, item) as tracked:
        started = time.monotonic()
        backbone = backbones.load(params.backbone, device())
        scratch = _scratch(params, settings)
        curve = Curve(tracked, scratch)
        setup = _setup(params, settings, backbone)
        report = _train(params, settings, setup, scratch, curve)
        if not distributed.is_main_process():
            return
        if item is None:
            curve.write(TRAINING / f"{name}.csv")
            shutil.rmtree(OUTPUT, ignore_errors=True)
            setup.model.save_pretrained(OUTPUT)
            setup.tokenizer.save_pretrained(OUTPUT)
        write_json(METRICS / f"{name}.json", {**report, "seconds": round(time.monotonic() - started, 1)})
        for name in ("accuracy", "local"):
            tracked.log_metrics({f"{name}_t{t}": a for t, a in report.get(name, {}).items()}, step=0)
        shutil.rmtree(scratch, ignore_errors=True)


def _setup(params: Params, settings: Preference, backbone: Backbone) -> Setup:
    """The preference model before training, with its tokenizer, backbone and noise schedule."""
    import torch

    from spo.diffusion.schedule import Schedule
    from spo.preference.model import StepAwarePreferenceModel, load_tokenizer
    from spo.preference.trainer import Setup

    schedule = Schedule.from_config(backbone.scheduler_config, settings.num_inference_steps)
    named = settings.tokenizer is not None
    tokenizer = load_tokenizer(settings.tokenizer or settings.init, None if named else settings.revision)
    torch.manual_seed(params.seed)  # the timestep embedding is drawn at random
    model = StepAwarePreferenceModel.from_clip(settings.init, settings.step_condition, settings.revision)
    if settings.logit_scale is not None:
        model.set_logit_scale(settings.logit_scale)
    return Setup(model.to(backbone.device), tokenizer, backbone, schedule)


def _train(params: Params, settings: Preference, setup: Setup, scratch: Path, curve: Curve) -> dict[str, Any]:
    """Train setup.model; returns its accuracy by timestep on validation pairs, and facts."""
    from spo.data.latent_cache import latent_pairs
    from spo.preference import trainer
    from spo.preference.pseudo_labels import pseudo_label
    from spo.training.checkpoint import CheckpointStore

    pairs = {part: latent_pairs(params, setup.backbone, part) for part in ("train", "validation")}
    facts: dict[str, Any] = {}
    if settings.labels is not None:
        device = str(setup.backbone.device)
        pairs["train"], facts["pseudo_labels"] = pseudo_label(pairs["train"], settings, device)
    store = CheckpointStore(scratch / "checkpoints")
    summary = trainer.train(
        setup, pairs["train"], settings, seed=params.seed, checkpoint=store, on_metrics=curve.log
    )
    if settings.local_prompts:
        facts["local"] = _local_judgement(params, settings, setup)
    timesteps, guidance = settings.eval_timesteps, settings.guidance
    measured = trainer.evaluate(setup, pairs["validation"], timesteps, guidance, seed=params.seed)
    return {
        "accuracy": {str(t): round(m["accuracy"], 4) for t, m in measured.items()},
        "n": int((pairs["validation"].label_0 != 0.5).sum()),
        "n_train": len(pairs["train"]),
        "updates": settings.steps,
        "training_seconds": summary["training_seconds"],
        "unet_samples": trainer.unet_samples(settings),
        **facts,
    }


def _local_judgement(params: Params, settings: Preference, setup: Setup) -> dict[str, float]:
    """Correlation with the oracle within the candidates of a step, by timestep.

    Raises:
        ValueError: there is no oracle, or too few validation prompts.
    """
    from spo.evaluation.local_judgement import local_judgement
    from spo.preference.reward_model import ClipRewardModel
    from spo.scenes.oracle import Oracle

    if params.score.oracle is None:
        raise ValueError("preference.local_prompts: needs score.oracle, which only scenes has; set it to 0")
    prompts = require(VALIDATION_PROMPTS, "validation prompts").read_text().splitlines()
    if len(prompts) < settings.local_prompts:
        raise ValueError(
            f"preference.local_prompts: {settings.local_prompts} is more than the {len(prompts)} prompts of "
            f"{VALIDATION_PROMPTS}"
        )
    by_timestep = local_judgement(
        setup.backbone,
        ClipRewardModel(setup.model, setup.tokenizer),
        Oracle(params.score.oracle),
        prompts[: settings.local_prompts],
        steps=settings.num_inference_steps,
        guidance=settings.guidance,
        seed=params.seed,
    )
    return {str(t): round(value, 4) for t, value in by_timestep.items()}


def _scratch(params: Params, settings: Preference) -> Path:
    sections = ("preference", params.seed, params.backbone, settings)
    inputs = [Path(p) for p in ("outputs/pairs", "outputs/inputs/base.json", "outputs/inputs/clip.json")]
    return SCRATCH / "resume" / f"preference-{fingerprint(sections, inputs, CODE)}"
