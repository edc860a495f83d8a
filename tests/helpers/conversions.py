"""Adapters to convert, their keys in kohya's files, and images of what is written."""

from __future__ import annotations

from pathlib import Path

import adapters
import torch
import yaml
from checkpoints import PROMPTS
from diffusers import DDIMScheduler

from spo import cli, config
from spo.diffusion.noise import SampleNoise
from spo.publish import original

DOWN = "down_blocks.1.attentions.0"
BLOCK = f"{DOWN}.transformer_blocks.0"
# a layer of each kind: its key in kohya's files of SD 1.5, and in those of SDXL, whose UNet has the original
# names (of the tests' UNet with one layer a block)
UNET = {
    f"{BLOCK}.attn1.to_q": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    ),
    f"{BLOCK}.attn2.to_out.0": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    ),
    f"{BLOCK}.ff.net.0.proj": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
    ),
    f"{BLOCK}.ff.net.2": (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_ff_net_2",
    ),
    f"{DOWN}.proj_in": ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_3_1_proj_in"),
    "mid_block.attentions.0.proj_out": (
        "lora_unet_mid_block_attentions_0_proj_out",
        "lora_unet_middle_block_1_proj_out",
    ),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k": (
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_k",
    ),
    "down_blocks.0.resnets.0.conv1": (
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_input_blocks_1_0_in_layers_2",
    ),
    "mid_block.resnets.1.conv2": (
        "lora_unet_mid_block_resnets_1_conv2",
        "lora_unet_middle_block_2_out_layers_3",
    ),
    "up_blocks.1.resnets.0.time_emb_proj": (
        "lora_unet_up_blocks_1_resnets_0_time_emb_proj",
        "lora_unet_output_blocks_2_0_emb_layers_1",
    ),
    "up_blocks.1.resnets.1.conv_shortcut": (
        "lora_unet_up_blocks_1_resnets_1_conv_shortcut",
        "lora_unet_output_blocks_3_0_skip_connection",
    ),
    "down_blocks.0.downsamplers.0.conv": (
        "lora_unet_down_blocks_0_downsamplers_0_conv",
        "lora_unet_input_blocks_2_0_op",
    ),
    "up_blocks.0.upsamplers.0.conv": (
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_unet_output_blocks_1_2_conv",
    ),
    "conv_in": ("lora_unet_conv_in", "lora_unet_input_blocks_0_0"),
    "conv_out": ("lora_unet_conv_out", "lora_unet_out_2"),
    "time_embedding.linear_1": ("lora_unet_time_embedding_linear_1", "lora_unet_time_embed_0"),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": "text_model_encoder_layers_0_self_attn_q_proj",
    "encoder.layers.1.self_attn.out_proj": "text_model_encoder_layers_1_self_attn_out_proj",
    "encoder.layers.0.mlp.fc1": "text_model_encoder_layers_0_mlp_fc1",
}
PREFIXES = {
    "sd": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}


def table(backbone, family: str) -> dict[str, dict[str, str]]:
    """component: module: its key in kohya's file."""
    found = {"unet": {name: keys[family == "sdxl"] for name, keys in UNET.items()}}
    if family == "sdxl":
        found["unet"]["add_embedding.linear_2"] = "lora_unet_label_emb_0_2"
    for component, prefix in PREFIXES[family].items():
        modules = dict(getattr(backbone.pipeline, component).named_modules())
        start = "text_model." if "text_model.encoder" in modules else ""
        found[component] = {f"{start}{name}": prefix + key for name, key in TEXT.items()}
    return found


def made(backbone, family: str, folder: Path, uniform: bool = False) -> tuple[Path, dict]:
    """An adapter of diffusers' format with alphas, and its changes by component."""
    state, parts = {}, {}
    for component, names in table(backbone, family).items():
        parts[component] = adapters.changes(backbone.pipeline.components[component], list(names))
        for name, change in parts[component].items():
            if uniform:
                change.down, change.up, change.alpha = change.down[:1], change.up[:, :1], 3.0
            key = f"{component}.{name if component == 'unet' else original.text_name(name)}"
            state |= {f"{key}.lora.down.weight": change.down, f"{key}.lora.up.weight": change.up}
            state[f"{key}.alpha"] = torch.tensor(change.alpha)
    return adapters.write(folder / "made.safetensors", state), parts


def params(folder: Path, family: str, checkpoint: Path, **more: object) -> config.Backbone:
    """Write params.yaml; its backbone."""
    raw = yaml.safe_load(config.preset("smoke"))
    raw["backbone"] = {"family": family, "checkpoint": str(checkpoint), **more}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return config.load(folder / "params.yaml").backbone


def convert(folder: Path, source: Path, target: Path, *arguments: str) -> int:
    words = ["convert", str(source), "--to", str(target), "--params", str(folder / "params.yaml")]
    return cli.main([*words, *arguments])


def drawn(pipe) -> torch.Tensor:
    """Images by diffusers' pipeline, as `ours` draws them."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    latents = SampleNoise(0, [1, 2], (4, side, side)).draw()
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 0.0, "output_type": "pt"}
    return pipe(PROMPTS, latents=latents, **options).images


def add(layer: torch.nn.Module, raw: dict[str, torch.Tensor], key: str) -> float:
    """Add alpha / rank * up @ down of a raw file to a layer's weight; returns alpha / rank."""
    down, up = raw[f"{key}.lora_down.weight"], raw[f"{key}.lora_up.weight"]
    strength = float(raw[f"{key}.alpha"]) / down.shape[0]
    assert down.ndim == up.ndim == layer.weight.ndim
    with torch.no_grad():
        layer.weight += strength * torch.einsum("or...,ri...->oi...", up, down)
    return strength


def norms(weight: torch.Tensor) -> torch.Tensor:
    """The norm of each output, [out,1] or [out,1,1,1]."""
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
