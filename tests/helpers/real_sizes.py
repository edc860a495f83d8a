"""Four bases (SD 1.5, SDXL, SD 3.5 medium, FLUX.1 dev) and the preference model at their real sizes, with
random weights.

Nothing is downloaded: the configs are those of the released checkpoints, written by hand; the words are the
small world's. For memory and time, not for pictures.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers import UNet2DConditionModel as UNet
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)

from spo import config
from spo.backbones import FAMILIES
from spo.backbones.stable_diffusion import StableDiffusion
from spo.data.latents import EncodedPairs
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.spo import SpoMethod
from spo.preference import trainer as spm
from spo.preference.model import ClipRewardModel, StepAwarePreferenceModel
from spo.preference.step_aware import StepAwareTask
from spo.scenes import world
from spo.training import loop
from spo.training.alignment import Alignment
from tools.scenes import tokenizer

PROMPTS = ["a large red circle above a small blue star on sand", "a small green ring on slate"]
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def text(words: Any, width: int, layers: int, heads: int, projection: int, kind: type, act: str) -> Any:
    settings = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=words.model_max_length,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(settings)


def vae(scaling_factor: float, side: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=side,
        scaling_factor=scaling_factor,
    )


def sd15(words: Any) -> StableDiffusionPipeline:
    unet = UNet(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    encoder = text(words, 768, 12, 12, 768, CLIPTextModel, "quick_gelu")
    return StableDiffusionPipeline(
        vae=vae(0.18215, 512),
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(**DDIM, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(words: Any) -> StableDiffusionXLPipeline:
    unet = UNet(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=vae(0.13025, 1024),
        text_encoder=text(words, 768, 12, 12, 768, CLIPTextModel, "quick_gelu"),
        text_encoder_2=text(words, 1280, 32, 20, 1280, CLIPTextModelWithProjection, "gelu"),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=DDIMScheduler(**DDIM, steps_offset=1),
    )


def t5_xxl() -> T5EncoderModel:
    settings = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(settings)


def vae16(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """That of both families of transformers."""
    settings = {**vae(scaling_factor, 1024).config, "latent_channels": 16, "shift_factor": shift_factor}
    return AutoencoderKL.from_config(settings | {"use_quant_conv": False, "use_post_quant_conv": False})


def sd35(words: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae16(1.5305, 0.0609),
        text_encoder=text(words, 768, 12, 12, 768, CLIPTextModelWithProjection, "quick_gelu"),
        text_encoder_2=text(words, 1280, 32, 20, 1280, CLIPTextModelWithProjection, "gelu"),
        text_encoder_3=t5_xxl(),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), words),
    )


def flux(words: Any) -> FluxPipeline:
    """FLUX.1 dev: the defaults of diffusers are its sizes."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae16(0.3611, 0.1159),
        text_encoder=text(words, 768, 12, 12, 768, CLIPTextModel, "quick_gelu"),
        text_encoder_2=t5_xxl(),
        **dict.fromkeys(("tokenizer", "tokenizer_2"), words),
    )


BASES = {"sd15": sd15, "sdxl": sdxl, "sd35": sd35, "flux": flux}
# presets that train everything; those of the other bases do so themselves
EVERYTHING = {"sd15": "sd15-scratch", "sdxl": "sdxl-scratch"}


def clip_h(words: Any) -> StepAwarePreferenceModel:
    """PickScore_v1's architecture."""
    vision = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        hidden_act="gelu",
    )
    found = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=words.model_max_length,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return StepAwarePreferenceModel(
        CLIPModel(CLIPConfig(text_config=found, vision_config=vision, projection_dim=1024))
    )


def backbone(pipeline: Any, family: str, device: str, dtype: torch.dtype) -> StableDiffusion:
    pipeline.to(device=device, dtype=dtype)
    used = dict(pipeline.scheduler.config)
    return StableDiffusion(pipeline, FAMILIES[family](pipeline), channels_last=False, scheduler_config=used)


def described(name: str, folder: Path) -> config.Params:
    """The preset that trains all on a base, with the config files of its models in a folder, no weights."""
    params = yaml.safe_load(config.preset(EVERYTHING.get(name, name)))
    family = params["backbone"]["family"]
    words = tokenizer.save(world.vocabulary(), folder / "words")
    words.model_max_length = 77
    base, clip = folder / family, folder / "clip-h"
    with torch.device("meta"):
        pipe, step_aware = BASES[name](words), clip_h(words)
    for part, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            (base / part).mkdir(parents=True, exist_ok=True)
            found = dict(model.config) if part in ("unet", "transformer", "vae") else model.config.to_dict()
            if part == "vae":
                found.pop("_use_default_values", None)
                found["force_upcast"] = False  # as SDXL's fp16-safe one, which the preset names
            text = json.dumps(found, default=str)
            (base / part / "config.json").write_text(text, encoding="utf-8")
    pipe.scheduler.save_pretrained(base / "scheduler")
    pipe.save_config(base)  # model_index.json
    step_aware.model.config.save_pretrained(clip)
    vae = None if params["backbone"]["vae"] is None else str(base / "vae")
    params["backbone"] |= {"checkpoint": str(base), "revision": None, "vae": vae}
    params["preference"] |= {"init": str(clip), "revision": None, "tokenizer": str(folder / "words")}
    params["score"]["pickscore"] |= {"model": str(clip), "revision": None}
    params["latent_preference"] |= {"text_projection": None, "revision": None}
    return config.validate(params)


def measure(
    family: str, model: StableDiffusion, step_aware: StepAwarePreferenceModel, words: Any, n: int = 2
) -> dict[str, dict[str, float]]:
    """Seconds (of the second of two rounds) and peak memory of an update of SPM, Diffusion-DPO and SPO.

    n pairs, or prompts, an update; the recipe is that of the family's preset where it decides the cost.
    """
    preset = config.validate(yaml.safe_load(config.preset({"sd": "sd15"}.get(family, family))))
    schedule = Schedule.from_config(model.scheduler_config, 20).to(model.device)
    drawn = np.random.default_rng(0).normal(size=(2 * n, 2, *model.latent_shape)).astype(np.float16)
    labels = torch.tensor([1.0, 0.0] * n)
    pairs = EncodedPairs(drawn, (PROMPTS * n)[: 2 * n], labels, torch.ones(2 * n))
    step_aware.to(model.device)
    found: dict[str, dict[str, float]] = {}

    settings = preset.preference.model_copy(update={"batch_size": n, "steps": 1, "labels": None})
    found["spm"] = _timed(
        model.device,
        lambda seed: spm.train(StepAwareTask(step_aware, words, model, schedule, settings), pairs, seed=seed),
    )
    step_aware.eval()
    model.add_lora(preset.align.spo.lora or config.Lora(rank=4, alpha=4), 0)
    change: dict[str, Any] = {"batch_size": n, "iterations": 1}
    dpo = preset.align.diffusion_dpo.model_copy(update=change)
    found["diffusion_dpo"] = _timed(
        model.device, lambda seed: _run(model, DiffusionDpoMethod(dpo, schedule, pairs, seed), dpo.optimizer)
    )
    change |= {"prompts_per_iteration": n, "threshold": 0.0}
    spo = preset.align.spo.model_copy(update=change)
    reward_model = ClipRewardModel(step_aware, words)
    found["spo"] = _timed(
        model.device,
        lambda seed: _run(model, SpoMethod(spo, schedule, reward_model, PROMPTS, seed), spo.optimizer),
    )
    return found


def _run(model: StableDiffusion, method: Any, optimizer: config.Optimizer) -> dict[str, Any]:
    losses: list[float] = []
    summary = loop.fit(
        Alignment("align.x", model, method),
        optimizer,
        checkpoints=None,
        checkpoint_every=1,
        on_metrics=lambda metrics, step: losses.append(metrics.get("loss", float("nan"))),
    )
    assert summary["updates"] > 0 and all(np.isfinite(losses)), (summary, losses)
    return summary


def _timed(device: torch.device, step: Any) -> dict[str, float]:
    seconds, result = 0.0, None
    cuda = device.type == "cuda"
    for seed in range(2):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.monotonic()
        result = step(seed)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    found = {"seconds": round(seconds, 3)}
    if isinstance(result, dict):
        found["updates"] = result["updates"]
    if cuda:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found
