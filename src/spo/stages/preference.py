"""Stage `preference`: train the step-aware preference model (SPM) and measure it by timestep."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import Params
from spo.stages.common import METRICS, SCRATCH, TRAINING, Curve, fingerprint, require, stage, write_json

if TYPE_CHECKING:
    from spo.data.latents import LatentPairs
    from spo.types import Backbone

OUTPUT = Path("outputs/preference")
# accuracies of the same CLIP without the step condition, and trained on clean pictures only: made
# once by `spo scenes build` with this stage's code, so that the default run need not train three models
BASELINES = Path("data/spm_baselines.json")


def run(params: Params, item: str | None = None) -> None:
    from spo import backbones
    from spo.stages.generate import device

    with stage("preference", params) as tracked:
        backbone = backbones.load(params.backbone, device())
        started = time.monotonic()
        model, tokenizer, accuracy, trained = train_and_measure(params, backbone, tracked)
        shutil.rmtree(OUTPUT, ignore_errors=True)
        model.save_pretrained(OUTPUT)
        tokenizer.save_pretrained(OUTPUT)
        report: dict[str, Any] = {"accuracy": {"step_aware": accuracy}, "n": trained["n_validation"]}
        if params.score.oracle is not None and BASELINES.exists():
            import json

            report["accuracy"] |= json.loads(BASELINES.read_text())
        seconds = round(time.monotonic() - started, 1)
        write_json(METRICS / "preference.json", {**report, **trained, "seconds": seconds})
        tracked.log_metrics({f"accuracy_t{t}": a for t, a in accuracy.items()}, step=0)
        shutil.rmtree(trained_folder(params), ignore_errors=True)


def train_and_measure(
    params: Params, backbone: Backbone, tracked: Any
) -> tuple[Any, Any, dict[str, float], dict[str, Any]]:
    """The SPM, its tokenizer, accuracy by timestep on validation pairs, and what training cost."""
    from spo.checkpoint import CheckpointStore
    from spo.diffusion.schedule import Schedule
    from spo.preference import train as spm
    from spo.preference.model import StepAwarePreferenceModel, load_tokenizer

    settings = params.preference
    schedule = Schedule.from_config(backbone.scheduler_config, settings.num_inference_steps)
    tokenizer = load_tokenizer(settings.init, settings.revision)
    model = StepAwarePreferenceModel.from_clip(settings.init, settings.step_condition, settings.revision)
    model.to(backbone.device)
    pairs = {part: latent_pairs(params, backbone, part) for part in ("train", "validation")}
    scratch = trained_folder(params)
    curve = Curve(tracked, scratch)
    common = (model, tokenizer, backbone, schedule)
    spm.train(
        *common,
        pairs["train"],
        settings,
        seed=params.seed,
        checkpoint=CheckpointStore(scratch / "checkpoints"),
        on_metrics=curve.log,
    )
    curve.write(TRAINING / "preference.csv")
    measured = spm.evaluate(
        *common, pairs["validation"], settings.eval_timesteps, settings.guidance, seed=params.seed
    )
    accuracy = {str(t): round(m["accuracy"], 4) for t, m in measured.items()}
    clear = int(len(pairs["validation"].clear()))
    cost = {"n_validation": clear, "n_train": len(pairs["train"]), "updates": settings.steps}
    return model, tokenizer, accuracy, cost


def trained_folder(params: Params) -> Path:
    sections = ("preference", params.seed, params.backbone, params.preference)
    inputs = [Path(p) for p in ("outputs/pairs", "outputs/inputs/base.json", "outputs/inputs/clip.json")]
    return SCRATCH / "resume" / f"preference-{fingerprint(sections, inputs)}"


def latent_pairs(params: Params, backbone: Backbone, part: str) -> LatentPairs:
    """The pairs of `part` (train, validation) as latents, encoded once for all stages that read them."""
    import json

    from spo.data.images import decode_image
    from spo.data.latents import encode
    from spo.data.pairs import read_pairs

    folder = require(Path("outputs/pairs") / part, "preference pairs")
    total = json.loads(Path("outputs/pairs/summary.json").read_text())[part]
    name = fingerprint(("latents", params.backbone), [folder, Path("outputs/inputs/base.json")])
    return encode(read_pairs(folder), total, backbone, decode_image, SCRATCH / "latents" / f"{part}-{name}")
