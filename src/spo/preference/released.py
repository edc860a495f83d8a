"""Released preference models in place of trained ones: official ones, and folders of the stage `preference`.

An official latent reward model (of LPO's code) is a folder, or one file of the whole module. A folder has
unet/, text_encoder/ and, of SDXL, text_encoder_2/ as `save_pretrained` writes them, and the heads in
state_dict.pt; a file has all of it and the VAE under the modules' names. Neither says what the visual feature
enhancement is, so params.yaml does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from spo.backbones import same_unet
from spo.backbones.description import config_file
from spo.backbones.tensors import check_finite
from spo.config import LatentPreference, Preference
from spo.data import weights
from spo.preference.checkpoint import WEIGHTS
from spo.preference.latent import LatentPreferenceModel, check_vae, vae_probe
from spo.preference.latent_training import LatentTask
from spo.preference.model import StepAwarePreferenceModel, clip_config, load_tokenizer
from spo.preference.step_aware import StepAwareTask
from spo.runtime import hub

HEADS = "state_dict.pt"
MODULES = {  # of the official module, as ours
    "unet": "encoder.unet",
    "text_encoder": "encoder.text_encoders.0",
    "text_encoder_2": "encoder.text_encoders.1",
}
UNUSED = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of the UNet, after its mid block
ADVICE = "take a latent reward model of this base model"


def task(settings: Preference | LatentPreference, path: Path, backbone: Any) -> StepAwareTask | LatentTask:
    """The released model at a path, to be measured and saved; `settings` are of its section."""
    device = backbone.device
    schedule = backbone.schedule(settings.num_inference_steps).to(device)
    if isinstance(settings, LatentPreference):
        return LatentTask(_latent(settings, path, backbone), backbone, schedule, settings)
    if path.is_dir():
        model, tokenizer = StepAwarePreferenceModel.from_pretrained(path), load_tokenizer(str(path))
    else:
        own = settings.init, settings.revision
        model = StepAwarePreferenceModel.from_official_checkpoint(path, clip_config(*own))
        tokenizer = load_tokenizer(*(hub.split_revision(settings.tokenizer) if settings.tokenizer else own))
    return StepAwareTask(model.to(device), tokenizer, backbone, schedule, settings)


def _latent(settings: LatentPreference, path: Path, backbone: Any) -> LatentPreferenceModel:
    if not (path / WEIGHTS).exists():
        return latent_model(path, backbone, settings.feature_guidance)
    model = LatentPreferenceModel.from_pretrained(path, backbone)
    if model.feature_guidance != settings.feature_guidance:
        raise ValueError(
            f"latent_preference.feature_guidance: is {settings.feature_guidance:g}, but {path} was trained "
            f"with {model.feature_guidance:g}; set that"
        )
    return model


def latent_model(path: Path, backbone: Any, feature_guidance: float) -> LatentPreferenceModel:
    """Load an official folder or file; every tensor must fit the base.

    Args:
        feature_guidance: of the VFE, with which it was trained.

    Raises:
        ValueError: it lacks a tensor, has another one, or is of another base or VAE.
    """
    model = LatentPreferenceModel(backbone.feature_model(), feature_guidance, encodes_empty_prompt=True)
    state = _of_folder(path, backbone, model) if path.is_dir() else weights.load_state(path, str(path))
    if vae := _below(state, "vae"):
        _check_vae(backbone, vae, f"{path}: vae")
    unet = {name for name in _below(state, "unet") if name.startswith(UNUSED)}
    own = {name: value for name, value in backbone.unet.state_dict().items() if name.startswith(UNUSED)}
    weights.check_keys(own.keys() - unet, unet - own.keys(), f"{path}: unet")
    for name in sorted(unet):
        if (found := state[f"unet.{name}"].shape) != own[name].shape:
            raise ValueError(
                f"{path} does not fit: unet.{name} is {[*found]}, the base's {[*own[name].shape]}"
            )
    names = {_plain(name): name for name in model.state_dict()}
    renamed = {}
    for key, value in state.items():
        module, _, name = key.partition(".")
        if module != "vae" and not key.endswith("position_ids") and name not in unet:
            ours = f"{MODULES[module]}.{name}" if module in MODULES else key
            renamed[names.get(_plain(ours), ours)] = value
    weights.fill(model, renamed, str(path))
    check_finite(model, str(path))
    return model.to(backbone.device).eval()


def _plain(name: str) -> str:
    """The same name for every version of transformers."""
    return name.replace(".text_model.", ".")


def _below(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    names = [key for key in state if key.startswith(f"{module}.")]
    return {key.removeprefix(f"{module}."): state[key] for key in names}


def _of_folder(folder: Path, backbone: Any, model: LatentPreferenceModel) -> dict[str, Tensor]:
    """All tensors of a folder under the names of the module; configs must be the base's."""
    state = _heads(folder / HEADS)
    for module in [*MODULES][: 1 + len(model.encoder.text_encoders)]:
        part = folder / module
        files = sorted(part.glob("*.safetensors")) or sorted(part.glob("*.bin"))
        if not files:
            raise ValueError(f"{part}: no weights there; {ADVICE}, or download all of its files")
        for file in files:  # shards
            state |= {f"{module}.{k}": v for k, v in weights.load_state(file, str(file)).items()}
    same_unet.check(backbone.unet, folder / "unet/config.json")
    for number, encoder in enumerate(model.encoder.text_encoders):
        part = folder / [*MODULES][1 + number]
        announced = CLIPTextConfig.from_dict(config_file(str(part), None, "config.json", str(part)))
        for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # that no shape shows
            if (found := getattr(announced, key)) != (own := getattr(encoder.config, key)):
                raise ValueError(
                    f"{part}/config.json: {key} is {found!r}, but the base's is {own!r}; {ADVICE}"
                )
    return state


def _heads(file: Path) -> dict[str, Tensor]:
    """The tensors of state_dict.pt, which are nested by module."""
    if not file.exists():
        raise ValueError(
            f"{file.parent}: neither a folder of `spo preference latent` nor an official latent reward "
            f"model, which has {HEADS}"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        nested = {k: v if isinstance(v, Mapping) else {"": v} for k, v in content.items()}
        return {
            f"{k}.{n}".strip("."): torch.as_tensor(v) for k, part in nested.items() for n, v in part.items()
        }
    except Exception as error:  # torch and pickle raise several types
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0][:200]})") from None


def _check_vae(backbone: Any, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse another VAE than the base's: its latents of a test image differ."""
    own = vae_probe(backbone)
    before = {name: value.clone() for name, value in backbone.vae.state_dict().items()}
    try:
        weights.fill(backbone.vae, state, where)
        check_vae(vae_probe(backbone), own, where, ADVICE)
    finally:
        backbone.vae.load_state_dict(before)
