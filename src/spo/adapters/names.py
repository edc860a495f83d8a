"""Layer names of UNets and text encoders as diffusers, the original releases and kohya write them.

diffusers' own converters are not used: `_maybe_map_sgm_blocks_to_diffusers` drops the original names of a
file that has both kinds, and SD 1.5's first upsampler is mistaken for an attention there.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"  # unet: the transformer too
COMPONENTS = (UNET, TEXT, TEXT_2)

_PREFIXES = {
    "base_model.model.": None,  # peft, for any component
    "unet.": UNET,
    "transformer.": UNET,
    "text_encoder.": TEXT,
    "text_encoder_2.": TEXT_2,
    "lora_unet_": UNET,
    "lycoris_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": TEXT_2,
    "model.diffusion_model.": UNET,
    "diffusion_model.": UNET,
}
# parts of names with several spellings, in the order of replacement
_SPELLINGS = (
    (r"\.processor\.", "."),
    (r"\.", "_"),
    (r"^text_model_", ""),
    (r"_(q|k|v|out)_proj$", r"_to_\1"),
    (r"_to_out_0$", "_to_out"),
)
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def split_component(stem: str) -> tuple[str, str]:
    """Split the part of a key before `.lora_down.weight` and the like into (component, layer)."""
    component = None
    while prefix := next((p for p in _PREFIXES if stem.startswith(p)), None):
        component, stem = component or _PREFIXES[prefix], stem.removeprefix(prefix)
    return component or UNET, stem


def layer_names(model: torch.nn.Module) -> dict[str, str]:
    """Map the `spelling` of a linear or convolution layer's names to its name in the model."""
    kinds = torch.nn.Linear | torch.nn.Conv2d
    own = {name: name for name, module in model.named_modules() if isinstance(module, kinds)}
    names = own | {original: name for original, name in original_names(model).items() if name in own}
    return {spelling(alias): name for alias, name in names.items()}


def spelling(name: str) -> str:
    """The one spelling of all names of a layer."""
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def original_names(model: Any) -> dict[str, str]:
    """Map the original names of the modules of SD 1.5's and SDXL's UNets to diffusers' names."""
    layers = getattr(model.config, "layers_per_block", None)
    if not isinstance(layers, int):
        return {}  # a text encoder, or blocks of different lengths, which the original format has not
    return {original: name for name, _ in model.named_modules() for original in _originals(name, layers)}


def _originals(name: str, layers: int) -> Iterator[str]:
    """The original names of a module of a UNet with so many layers in each block."""
    if name in _TOP:
        yield _TOP[name]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, j, rest = match.groups()
        yield f"middle_block.{2 * int(j) if kind == 'resnets' else 1}.{_RESNET.get(rest, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not match:
        return
    side, i, kind, j, rest = match.groups()
    first = (layers + 1) * int(i)
    if kind == "downsamplers":
        yield f"input_blocks.{first + layers + 1}.0.op"
    elif kind == "upsamplers":  # after the attention, where the block has one
        yield from (f"output_blocks.{first + layers}.{place}.{rest}" for place in (1, 2))
    else:
        block = f"input_blocks.{first + int(j) + 1}" if side == "down" else f"output_blocks.{first + int(j)}"
        yield f"{block}.{int(kind == 'attentions')}.{_RESNET.get(rest, rest)}"
