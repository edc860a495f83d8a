"""A LoRA in the key names of kohya's trainer, which A1111 and ComfyUI read.

Every layer has its alpha, so strength 1.0 in those programs is the adapter as it is here. diffusers'
`convert_state_dict_to_kohya` is not used: it writes alpha = rank whatever the adapter's is, takes SDXL's
names for the text encoder of SD 1.5, and leaves DoRA's magnitudes in peft's names.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spo import backbones, config
from spo.adapters import files, lora
from spo.adapters.names import COMPONENTS, TEXT, TEXT_2, UNET
from spo.backbones.loading import empty_models
from spo.data.weights import Weights
from spo.publish import original
from spo.runtime.files import atomic

PREFIXES = {
    "sd": {UNET: "lora_unet_", TEXT: "lora_te_"},
    "sdxl": {UNET: "lora_unet_", TEXT: "lora_te1_", TEXT_2: "lora_te2_"},
}


def write(settings: config.Backbone, weights: Weights, file: Path) -> None:
    """Write a LoRA, LoCon or DoRA of any format that `generate` reads; `settings` are of its base model."""
    if settings.family not in PREFIXES:
        raise ValueError(f"{file}: kohya's names for family {settings.family!r} are not written")
    description = backbones.describe(settings)
    files.check_header(weights, settings.family, description.prediction)
    models = {part: model for part, model in empty_models(description).items() if part in COMPONENTS}
    names = original.unet_names(models[UNET]) if settings.family == "sdxl" else {}
    state: dict[str, Tensor] = {}
    ranks, alphas = set(), set()
    for layer in lora.read(models, weights):
        is_unet = layer.component == UNET
        name = names.get(layer.name, layer.name) if is_unet else original.text_name(layer.name)
        key = PREFIXES[settings.family][layer.component] + name.replace(".", "_")
        values, rank = layer.values, len(layer.values["down"])
        alpha = torch.tensor(layer.scale * rank, dtype=torch.float32)
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = values["down"], values["up"]
        state[f"{key}.alpha"] = alpha
        if "magnitude" in values:  # the norm of each output, in the shape of LyCORIS
            state[f"{key}.dora_scale"] = values["magnitude"].reshape(-1, *[1] * (layer.weight.ndim - 1))
        ranks.add(rank)
        alphas.add(float(alpha))
    if any(key.endswith(".dora_scale") for key in state):
        print(
            f"spo: {file}: DoRA, which A1111 and ComfyUI divide by other norms: merge it for the same images",
            file=sys.stderr,
        )
    said = original.header(settings.family, description.denoiser, description.prediction, file.stem)
    said |= _kohyas(said["modelspec.architecture"], ranks, alphas)
    with atomic(file) as partial:
        save_file({key: value.contiguous() for key, value in state.items()}, partial, metadata=said)


def _kohyas(architecture: str, ranks: set[int], alphas: set[float]) -> dict[str, str]:
    """What A1111 reads in a header; several ranks or alphas are `Dynamic`, as in kohya's own files."""
    sd = architecture.replace("stable-diffusion-v", "sd_v")
    rank, alpha = (f"{min(found):g}" if len(found) == 1 else "Dynamic" for found in (ranks, alphas))
    return {
        "modelspec.architecture": f"{architecture}/lora",
        "ss_base_model_version": "sdxl_base_v1-0" if "xl" in architecture else sd,
        "ss_v2": str(sd == "sd_v2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
    }
