"""`spo STAGE --dry-run`: a stage's inputs, compute, memory and approximate time; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params, Scorers
from spo.runtime import hub
from spo.types import Budget

if TYPE_CHECKING:
    from spo.estimate import Count


def lines(params: Params, stage: str, variant: str | None) -> list[str]:
    """The plan of a stage, line by line; refuses an input that is not there and no earlier stage makes."""
    plan = [f"{stage}{f' {variant}' if variant else ''} ({params.name}): dry run, nothing is written"]
    if why := _nothing(params, stage, variant):
        return [*plan, f"nothing to do: {why}"]
    plan += [_reach(key, name, revision) for key, name, revision in _inputs(params, stage, variant)]
    if stage not in ("preference", "align", "generate") or _pretrained(params, stage, variant):
        return plan
    from spo import estimate
    from spo.training import budget
    from spo.training.distributed import device

    cut = budget.of(params, budget.kind(stage, variant))
    found = estimate.count(params, stage, variant, cut)
    base = found.base
    plan.append(
        f"UNet {base.unet_parameters / 1e6:.1f} M, VAE {base.vae_parameters / 1e6:.1f} M parameters; "
        f"latents {list(base.latent_shape)}; {base.unet_flops / 1e9:.1f} GFLOP per UNet sample"
    )
    plan += [found.text, *_memory(params, stage, variant, cut, found)]
    return [*plan, _time(found, estimate.rate(params.backbone, device()), device())]


def _nothing(params: Params, stage: str, variant: str | None) -> str | None:
    """Why a stage would do nothing; None if it would."""
    model = "latent_preference" if variant == "latent" else "preference"
    if stage == "pairs" and params.pairs.source is None:
        return "pairs.source is null"
    if stage == "preference" and not params.wants(model):
        return f"no method is trained with {model}"
    if stage == "align" and getattr(params.align, variant or "spo") is None:
        return f"align.{variant} is null"
    if stage in ("generate", "score") and getattr(params.generate, variant or "base") is None:
        return f"generate.{variant} is null"
    return None


def _pretrained(params: Params, stage: str, variant: str | None) -> str | None:
    """The released model that a stage takes in place of training."""
    if stage == "preference":
        own = params.latent_preference if variant == "latent" else params.preference
        return own.pretrained
    return params.align.section(variant or "spo").pretrained if stage == "align" else None


def _inputs(params: Params, stage: str, variant: str | None) -> list[tuple[str, str, str | None]]:
    """The inputs of a stage: (key, path or hub id, revision)."""
    from spo.methods import method_spec

    b, p, latent, prompts = params.backbone, params.preference, params.latent_preference, params.prompts
    base = [("backbone.checkpoint", b.checkpoint, b.revision), ("backbone.vae", b.vae, None)]
    clip = [("preference.init", p.init, p.revision), ("preference.tokenizer", p.tokenizer, None)]
    projection = [("latent_preference.text_projection", latent.text_projection, latent.revision)]
    start = projection if variant == "latent" else clip
    released = _pretrained(params, stage, variant)
    lists = [(f"prompts.{name}", getattr(prompts, name), None) for name in ("train", "evaluation")]
    pairs = [("pairs.source", params.pairs.source, None), *_scorers("pairs.filter", params.pairs.filter)]
    scorers = _scorers("score", params.score)
    reads: dict[str, list[tuple[str, str | None, str | None]]] = {
        "inputs": [*base, *clip, *projection, *lists, *pairs, *scorers],
        "prompts": [*lists, *pairs, base[0]],
        "pairs": pairs,
        "preference": [*base, *start, ("pairs", "outputs/pairs", None)],
        "align": [*base],
        "generate": [*base],
        "score": [*scorers, ("images", f"outputs/images/{variant}", None)],
        "report": [("scores", "outputs/scores", None)],
    }
    if released is not None:
        reads[stage] = [*base, (f"{stage} {variant or ''}".strip() + ".pretrained", released, None)]
    elif stage == "align":
        reads[stage] += [("trained on", path, None) for path in method_spec(variant or "spo").reads]
    if stage == "generate":
        reads[stage].append(("adapter", params.generate.variant(variant or "base").adapter, None))
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


def _memory(params: Params, stage: str, variant: str | None, cut: Budget, found: Count) -> list[str]:
    """The stage's memory on its device; if it exceeds the device's, also the smallest budget."""
    from spo import estimate
    from spo.training import budget

    size = budget.memory(params.device)
    phases = ", ".join(f"{name} {phase.peak / 1e9:.2f}" for name, phase in found.phases.items())
    lines = [
        f"memory: {found.peak / 1e9:.2f} GB at the peak, beside what libraries take: {phases}; "
        f"of them models {found.weights / 1e9:.2f}",
        f"device: {_budget(cut)}",
    ]
    if size < float("inf") and found.peak > (limit := budget.usable(size)):
        least = estimate.count(params, stage, variant, budget.LEAST).peak
        verdict = "fits" if least <= limit else "does not fit either"
        lines.append(
            f"memory: more than the {limit / 1e9:.2f} GB that {size / 2**30:g} GiB leave for tensors; "
            f"{least / 1e9:.2f} GB, with device: {_budget(budget.LEAST)}, {verdict}"
        )
    return lines


def _budget(cut: Budget) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in cut._asdict().items())


def _time(found: Count, rate: float, device: str) -> str:
    """Hours of the stage; of a stage with rollouts also without any valid pair."""
    most, least = (f"{flops / rate / 3600:.2g}" for flops in (found.flops(), found.flops(valid=False)))
    about = f"about {most} h" + ("" if most == least else f" if every pair is valid, {least} h if none is")
    work = f"{found.flops() / 1e12:.3g} TFLOP at {rate / 1e9:.3g} GFLOP/s"
    return f"time: {about} on this {device}, beside starting and scoring: {work}"
