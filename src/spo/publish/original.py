"""A complete model in one file with the tensor names of the original releases (SD 1.5: LDM, SDXL: SGM).

diffusers reads such files and has no writer for them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spo.adapters.names import TEXT, TEXT_2, original_names
from spo.backbones import FAMILIES, StableDiffusion, single_file
from spo.runtime.files import atomic

# what is written in another way, in the order of replacement
_VAE = (
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
)
_OPEN_CLIP = (
    ("final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"),
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"q_proj\.", "in_proj_"),
)


def write(backbone: StableDiffusion, family: str, file: Path) -> None:
    """Write UNet, VAE and text encoders of a backbone without an adapter; a model of SD 2 is refused."""
    if not FAMILIES[family].text_prefixes:
        raise ValueError(f"{file}: single files of family {family!r} are not written; give a folder by --to")
    unet, parts, used = backbone.unet, backbone.pipeline.components, backbone.scheduler_config
    said = header(family, unet.config, used.get("prediction_type"), file.stem)
    if said["modelspec.architecture"] == "stable-diffusion-v2":
        raise ValueError(f"{file}: single files of SD 2 are not written; give a folder by --to")
    first, *second = FAMILIES[family].text_prefixes
    state = _prefixed(single_file.UNET, _unet(unet)) | _prefixed(single_file.VAE, _vae(backbone.vae))
    text = {text_name(key): value for key, value in parts[TEXT].state_dict().items()}
    state |= _prefixed(f"{first}transformer.", text)
    for prefix in second:
        state |= _prefixed(f"{prefix}model.", _open_clip(parts[TEXT_2].state_dict()))
    if used.get("prediction_type") == "v_prediction":
        state[single_file.V_PREDICTION] = torch.empty(0)
    if used.get("rescale_betas_zero_snr"):
        state[single_file.ZERO_SNR] = torch.empty(0)
    with atomic(file) as partial:
        save_file({key: value.contiguous() for key, value in state.items()}, partial, metadata=said)


def header(family: str, unet: Mapping[str, Any], prediction: str | None, title: str) -> dict[str, str]:
    """What a file says of its model, in the keys of ModelSpec; `unet` is the config of the UNet."""
    version = "2" if unet.get("cross_attention_dim") == 1024 else "1"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if family == 'sdxl' else f'v{version}'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def text_name(key: str) -> str:
    """The name of a tensor or module of a text encoder, with `text_model.`, which some versions leave out."""
    return key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"


def unet_names(unet: Any) -> dict[str, str]:
    """Map the modules of a UNet to their original names."""
    names = {}
    for original, name in original_names(unet).items():
        if match := re.match(r"(up_blocks\.\d+)\.upsamplers", name):
            has_attention = hasattr(unet.get_submodule(match[1]), "attentions")
            if original.split(".")[2] != ("2" if has_attention else "1"):
                continue
        names[name] = original
    return names


def _unet(unet: Any) -> dict[str, Tensor]:
    names, state = unet_names(unet), {}
    for key, value in unet.state_dict().items():
        module, _, parameter = key.rpartition(".")
        state[f"{names.get(module, module)}.{parameter}"] = value
    return state


def _vae(vae: Any) -> dict[str, Tensor]:
    """The autoencoder, whose decoder's blocks are numbered backwards and whose attention is of kernels."""
    last, state = len(vae.config.up_block_types) - 1, {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", key)
        name = _renamed(name, _VAE)
        state[name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return state


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder, with q, k and v in one matrix."""
    state = {}
    for key, value in text.items():
        if key == "text_projection.weight":
            state["text_projection"] = value.T
        elif ".k_proj." not in key and ".v_proj." not in key:
            if ".q_proj." in key:
                value = torch.cat([text[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            state[_renamed(key.removeprefix("text_model."), _OPEN_CLIP)] = value
    return state


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
