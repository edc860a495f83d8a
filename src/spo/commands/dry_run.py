"""`spo STAGE --dry-run`: a stage's inputs, compute, memory and approximate time; nothing is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params

if TYPE_CHECKING:
    from spo.backbones.sizes import Sizes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EFFICIENCY = 0.5  # FLOP/s of a UNet, as a fraction of those of a large matrix product


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

    size = sizes.measure(params.backbone)
    plan.append(
        f"UNet {size.unet_parameters / 1e6:.1f} M, VAE {size.vae_parameters / 1e6:.1f} M parameters; "
        f"latents {list(size.latent_shape)}; {size.unet_flops / 1e9:.1f} GFLOP per UNet sample"
    )
    samples, text = _work(params, stage, variant, size)
    plan += [text, _memory(params, stage, variant, size), _time(size, samples, params.backbone.dtype)]
    return plan


def _inputs(params: Params, stage: str, variant: str | None) -> list[tuple[str, str, str | None]]:
    """The inputs of a stage: (key, path or hub id, revision)."""
    from spo.methods import method_spec

    b, p, s = params.backbone, params.preference, params.score
    base = [("backbone.checkpoint", b.checkpoint, b.revision), ("backbone.vae", b.vae, None)]
    clip = [("preference.init", p.init, p.revision), ("preference.tokenizer", p.tokenizer, None)]
    lists = [
        ("prompts.train", params.prompts.train, None),
        ("prompts.evaluation", params.prompts.evaluation, None),
    ]
    pairs = [("pairs.source", params.pairs.source, None)]
    scorers = [
        ("score.pickscore.model", s.pickscore.model, s.pickscore.revision),
        ("score.hps.checkpoint", s.hps.checkpoint, None),
        ("score.aesthetic.clip", s.aesthetic.clip, s.aesthetic.revision),
        ("score.aesthetic.head", s.aesthetic.head, None),
    ]
    method = variant if stage == "align" and variant else "spo"
    trained_on = [("trained on", path, None) for path in method_spec(method).reads]
    reads: dict[str, list[tuple[str, str | None, str | None]]] = {
        "inputs": [*base, *clip, *lists, *pairs, *scorers],
        "prompts": [*lists, *pairs, base[0]],
        "pairs": [*pairs],
        "preference": [*base, *clip, ("pairs", "outputs/pairs", None)],
        "align": [*base, *trained_on],
        "generate": [*base, ("adapter", getattr(params.generate, variant or "base").adapter, None)],
        "score": [*scorers, ("images", f"outputs/images/{variant}", None)],
        "report": [("scores", "outputs/scores", None)],
    }
    return [(key, name, revision) for key, name, revision in reads[stage] if name is not None]


def _reach(key: str, name: str, revision: str | None) -> str:
    from spo.data.manifest import manifest

    if Path(name).exists():
        return f"{key}: {name}"
    if name.startswith("outputs/"):
        return f"{key}: {name} (output of an earlier stage)"
    try:
        pins = manifest(name, revision)
        return f"{key}: {name} at {pins['revision']}" if "revision" in pins else f"{key}: {name}"
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _work(params: Params, stage: str, variant: str | None, size: Sizes) -> tuple[int, str]:
    """The UNet samples of a stage in forward passes, guidance included, and a line about them."""
    from spo.diffusion.denoiser import is_guided
    from spo.methods import method_spec

    if stage == "generate":
        guidance, settings = getattr(params.generate, variant or "base").guidance, params.generate
        count = params.prompts.n_test if settings.split == "test" else params.prompts.n_validation
        doubled = 1 + is_guided(guidance)
        steps = f"{count} images of {settings.num_inference_steps} steps, guidance {guidance:g}"
        return count * settings.num_inference_steps * doubled, steps
    if stage == "preference":
        from spo.preference.trainer import unet_samples

        p = params.preference
        return unet_samples(p), f"{p.steps} updates of {p.batch_size} pairs"
    method = variant or "spo"
    cost = method_spec(method).cost(getattr(params.align, method), size.scheduler_config)
    return cost.unet_samples, cost.text


def _memory(params: Params, stage: str, variant: str | None, size: Sizes) -> str:
    from spo.backbones import sizes

    width = BYTES[params.backbone.dtype]
    total, kind = width * (size.unet_parameters + size.vae_parameters), "weights of UNet and VAE"
    if stage == "align":
        section = getattr(params.align, variant or "spo")
        state = 2 if section.optimizer.eight_bit else 8  # bytes of Adam's two moments; weight, gradient: fp32
        if section.lora is None:
            total += (4 + 4 + state) * size.unet_parameters
            kind += ", full fine-tuning (fp32 weights, gradients, Adam; frozen reference)"
        else:
            trained = sizes.lora_parameters(params.backbone, section.lora)
            total += (4 + 4 + state) * trained
            kind += f", a LoRA of {trained / 1e6:.2f} M with its gradients and Adam"
    return f"memory: {total / 2**30:.2f} GiB for {kind}; plus text encoders, preference model and activations"


def _time(size: Sizes, samples: int, dtype: str) -> str:
    import torch

    from spo.training.distributed import device

    place, kind = device(), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    n = 8192 if place != "cpu" else 512
    a = torch.ones(n, n, device=place, dtype=kind)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.monotonic() - started)
    speed = 2 * n**3 / min(seconds)
    hours = samples * size.unet_flops / speed / EFFICIENCY / 3600
    return f"time: {samples} UNet samples, about {hours:.2g} h on this {place} ({speed / 1e12:.2g} TFLOP/s)"
