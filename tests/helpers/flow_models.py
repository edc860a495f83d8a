"""Tiny random checkpoints with the classes and config fields of Stable Diffusion 3.5 and FLUX.1."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

SIDE = 16  # of an image, in pixels; latents are 8 x 8
WIDTH, JOINT = 32, 64  # of a CLIP and of T5


def clip(words: Any, kind: type) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=24,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def t5(words: Any) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=JOINT, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16,
        sample_size=SIDE,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3(words: Any, with_t5: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        caption_projection_dim=32,
        pooled_projection_dim=2 * 24,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(words, CLIPTextModelWithProjection),
        tokenizer=words,
        text_encoder_2=clip(words, CLIPTextModelWithProjection),
        tokenizer_2=words,
        text_encoder_3=t5(words) if with_t5 else None,
        tokenizer_3=words if with_t5 else None,
    )


def flux(words: Any, dev: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        pooled_projection_dim=WIDTH,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=vae(),
        text_encoder=clip(words, CLIPTextModel),
        tokenizer=words,
        text_encoder_2=t5(words),
        tokenizer_2=words,
        transformer=transformer,
    )


def livelier(pipeline: Any) -> Any:
    """Scale up random layers, so that prompt, guidance and latents have a measurable effect."""
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "embedder" in name or "proj_out" in name or "norm1" in name:
                parameter.mul_(3)
        pipeline.vae.decoder.conv_out.weight.mul_(3)
    return pipeline
