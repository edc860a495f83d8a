"""`spo STAGE --dry-run`: a stage's inputs, compute, memory and approximate time; nothing is written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Scorers
from spo.runtime import hub
from spo.types import Budget

if TYPE_CHECKING:
    from spo.estimate.plan import Plan


def lines(params: Params, stage: str, variant: str | None) -> list[str]:
    """The plan of a stage, line by line.

    Raises:
        ValueError: an input that neither exists, nor can be reached, nor is an output of an earlier stage.
    """
    plan = [f"{stage}{f' {variant}' if variant else ''} ({params.name}): dry run, nothing is written"]
    plan += [_reach(key, name, revision) for key, name, revision in _inputs(params, stage, variant)]
    if stage not in ("preference", "align", "generate"):
        return plan
    from spo.backbones import sizes
    from spo.estimate import time
    from spo.estimate.plan import plan as planned
    from spo.training import budget
    from spo.training.distributed import device

    size = sizes.measure(params.backbone)
    work = planned(params, stage, variant, size.scheduler_config)
    cut = budget.of(params, budget.kind(stage, variant))
    timed = time.Estimate(params, stage, variant, work, device(), cut.checkpointing)
    plan.append(
        f"UNet {size.unet_parameters / 1e6:.1f} M, VAE {size.vae_parameters / 1e6:.1f} M parameters; "
        f"latents {list(size.latent_shape)}; {size.unet_flops / 1e9:.1f} GFLOP per UNet sample"
    )
    plan += [work.text, *_memory(params, stage, variant, cut), _time(work, timed.seconds(), device())]
    return plan


def _inputs(params: Params, stage: str, variant: str | None) -> list[tuple[str, str, str | None]]:
    """The inputs of a stage: (key, path or hub id, revision)."""
    from spo.methods import method_spec

    b, p, s, latent = params.backbone, params.preference, params.score, params.latent_preference
    base = [("backbone.checkpoint", b.checkpoint, b.revision), ("backbone.vae", b.vae, None)]
    clip = [("preference.init", p.init, p.revision), ("preference.tokenizer", p.tokenizer, None)]
    projection = [("latent_preference.text_projection", latent.text_projection, latent.revision)]
    lists = [
        ("prompts.train", params.prompts.train, None),
        ("prompts.evaluation", params.prompts.evaluation, None),
    ]
    pairs = [("pairs.source", params.pairs.source, None), *_scorers("pairs.filter", params.pairs.filter)]
    scorers = _scorers("score", s)
    method = variant if stage == "align" and variant else "spo"
    adapter = getattr(params.generate, variant or "base").adapter if stage == "generate" else None
    trained_on = [("trained on", path, None) for path in method_spec(method).reads]
    reads: dict[str, list[tuple[str, str | None, str | None]]] = {
        "inputs": [*base, *clip, *projection, *lists, *pairs, *scorers],
        "prompts": [*lists, *pairs, base[0]],
        "pairs": [*pairs],
        "preference": [
            *base,
            *(projection if variant == "latent" else clip),
            ("pairs", "outputs/pairs", None),
        ],
        "align": [*base, *trained_on],
        "generate": [*base, ("adapter", adapter, None)],
        "score": [*scorers, ("images", f"outputs/images/{variant}", None)],
        "report": [("scores", "outputs/scores", None)],
    }
    return [(key, name, revision) for key, name, revision in reads[stage] if name is not None]


def _scorers(key: str, section: Scorers | None) -> list[tuple[str, str | None, str | None]]:
    return [
        (f"{key}.{name}.{file}", *source)
        for name, settings in (section.configured() if section else {}).items()
        for file, source in settings.sources().items()
    ]


def _reach(key: str, name: str, revision: str | None) -> str:
    from spo.ingest.manifest import manifest

    if Path(name).exists():
        return f"{key}: {name}"
    if name.startswith("outputs/"):
        return f"{key}: {name} (output of an earlier stage)"
    try:
        if hub.is_hub_url(name) or hub.is_hub_id(name):
            return f"{key}: {name} at {hub.commit(name, revision)}"  # nothing is downloaded
        manifest(name, revision)
        return f"{key}: {name}"
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _memory(params: Params, stage: str, variant: str | None, cut: Budget) -> list[str]:
    """What the stage needs on its device with its budget; more than that has is said, with what would fit."""
    from spo import estimate
    from spo.training import budget

    found, size = estimate.peak(params, stage, variant, cut), budget.memory(params.device)
    phases = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in found.phases.items())
    lines = [
        f"memory: {found.most / 1e9:.2f} GB at the peak, beside what libraries take: {phases}; "
        f"of them models {found.weights / 1e9:.2f}",
        f"device: {_budget(cut)}",
    ]
    if size < float("inf") and found.most > (limit := budget.usable(size)):
        least = estimate.peak(params, stage, variant, budget.LEAST).most
        verdict = "fits" if least <= limit else "does not fit either"
        lines.append(
            f"memory: more than the {limit / 1e9:.2f} GB that {size / 2**30:g} GiB leave for tensors; "
            f"{least / 1e9:.2f} GB, with device: {_budget(budget.LEAST)}, {verdict}"
        )
    return lines


def _budget(cut: Budget) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in cut._asdict().items())


def _time(work: Plan, seconds: dict[str, float], device: str) -> str:
    from spo.estimate.time import hours

    most, least = (f"{hours(w, seconds):.2g}" for w in (work.most, work.least))
    about = f"about {most} h" + ("" if most == least else f" if every pair is valid, {least} h if none is")
    counts = ", ".join(
        f"{count} {kind.replace('_', ' ')} ({1000 * seconds[kind]:.3g} ms)"
        for kind, count in asdict(work.most).items()
        if count
    )
    return f"time: {about} on this {device}, beside starting and scoring; samples: {counts}"
