"""A LoRA in the key names of kohya's trainer, which A1111 and ComfyUI read.

Every layer has its alpha, so strength 1.0 in those programs is the adapter as it is here. diffusers'
`convert_state_dict_to_kohya` is not used: it writes alpha = rank whatever the adapter's is, takes SDXL's
names for the text encoder of SD 1.5, and leaves DoRA's magnitudes in peft's names.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from spo import backbones, config
from spo.adapters import files, lora
from spo.adapters.names import COMPONENTS, TEXT, TEXT_2, UNET
from spo.backbones import Description
from spo.backbones.description import PARTS, config_file, described_where
from spo.backbones.loading import empty_models
from spo.backbones.weights import Weights
from spo.publish.header import base_model
from spo.publish.original import text_name, unet_names
from spo.runtime.files import atomic

_PREFIXES = {
    "sd": {UNET: "lora_unet_", TEXT: "lora_te_"},
    "sdxl": {UNET: "lora_unet_", TEXT: "lora_te1_", TEXT_2: "lora_te2_"},
}


def write(settings: config.Backbone, weights: Weights, file: Path) -> None:
    """Write a LoRA, LoCon or DoRA of any format that `generate` reads; `settings`: of its base model.

    Raises:
        ValueError: the adapter is of another kind, or does not fit the base model.
    """
    description = backbones.describe(settings)
    files.check_header(weights, settings.family, description.prediction)
    models = _models(description)
    original = unet_names(models[UNET]) if settings.family == "sdxl" else {}
    state: dict[str, Tensor] = {}
    ranks, alphas = set(), set()
    for layer in lora.read(models, weights):
        name = original.get(layer.name, layer.name) if layer.component == UNET else text_name(layer.name)
        key = _PREFIXES[settings.family][layer.component] + name.replace(".", "_")
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
    base = base_model(settings.family, description.unet["cross_attention_dim"], description.prediction)
    _save(state, file, base.adapter(file.stem, ranks, alphas))


def _save(state: dict[str, Tensor], file: Path, said: dict[str, str]) -> None:
    """Write the file with the hash of its tensors, by which A1111 knows it again."""
    state = {key: value.contiguous() for key, value in state.items()}
    content = save(state)
    start = 8 + int.from_bytes(content[:8], "little")
    said["sshash_model_hash"] = hashlib.sha256(content[start:]).hexdigest()
    with atomic(file) as partial:
        partial.write_bytes(save(state, metadata=said))


def _models(description: Description) -> dict[str, Any]:
    """UNet and text encoders on the meta device: layers and shapes without weights."""
    import transformers

    settings = description.settings
    where, models = described_where(settings), {UNET: empty_models(description)[0]}
    for part in COMPONENTS[1:]:
        if kind := PARTS[settings.family].get(part):
            said = config_file(settings.described_by, settings.revision, f"{part}/config.json", where)
            with torch.device("meta"):
                models[part] = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(said))
    return models
