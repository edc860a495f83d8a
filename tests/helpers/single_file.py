"""A diffusers folder of either family as one file with the names of the original release."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
OPEN_CLIP = {
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write(folder: Path, file: Path, layers: int, vae_blocks: int) -> None:
    """`layers` a UNet block; `vae_blocks` of the VAE's encoder."""
    two = (folder / "text_encoder_2").exists()
    text = "conditioner.embedders.0.transformer." if two else "cond_stage_model.transformer."
    parts = {
        "model.diffusion_model.": (folder / "unet/diffusion_pytorch_model.safetensors", unet_name(layers)),
        "first_stage_model.": (folder / "vae/diffusion_pytorch_model.safetensors", vae_name(vae_blocks)),
        text: (folder / "text_encoder/model.safetensors", text_name),
    }
    state = {}
    for prefix, (source, name) in parts.items():
        for key, value in load_file(source).items():
            new = name(key)
            linear = prefix == "first_stage_model." and ".attn_1." in new and value.ndim == 2
            state[prefix + new] = (value[:, :, None, None] if linear else value).contiguous()
    if two:
        second = open_clip(load_file(folder / "text_encoder_2/model.safetensors"))
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    save_file(state, file)


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder with projection under open_clip's names: q, k and v are one matrix there."""
    converted = {"text_projection": state["text_projection.weight"].T.contiguous()}
    for key in (k for k in state if k.startswith("text_model.")):
        if ".k_proj." in key or ".v_proj." in key:
            continue
        name, value = key.removeprefix("text_model."), state[key]
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        converted[name] = value
    return converted


def text_name(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def unet_name(layers: int):
    def name(key: str) -> str:
        for ours, theirs in TOP.items():
            if key.startswith(f"{ours}."):
                return inner(f"{theirs}.{key.removeprefix(f'{ours}.')}", "mid_block.resnets" in ours)
        side, i, kind, j, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
        first, j = (layers + 1) * int(i), int(j)
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
            return inner(
                f"input_blocks.{first + j + 1}.{int(kind == 'attentions')}.{rest}", kind == "resnets"
            )
        if (
            kind == "upsamplers"
        ):  # after the attention where there is one: in this kind, the first block alone
            return f"output_blocks.{first + layers}.2.{rest}"
        return inner(f"output_blocks.{first + j}.{int(kind == 'attentions')}.{rest}", kind == "resnets")

    return name


def inner(key: str, resnet: bool) -> str:
    if not resnet:
        return key
    head, last, end = key.rsplit(".", 2)
    return f"{head}.{RESNET[last]}.{end}"


def vae_name(blocks: int):
    def name(key: str) -> str:
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key
        )
        key = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key
        )
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        if ".attn_1." in key:
            for ours, theirs in VAE_ATTENTION.items():
                key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
        return key

    return name
