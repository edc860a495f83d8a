"""Checkpoints of one .safetensors file, with the names of the original releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open

from spo import config
from spo.runtime.messages import first_line

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "sd": ("cond_stage_model.",),
    "sdxl": ("conditioner.embedders.0.", "conditioner.embedders.1."),
}
# Empty tensors by which trainers and user interfaces mark a file.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
EDM = {
    "edm_mean": "EDM",
    "edm_std": "EDM",
    "edm_vpred.sigma_max": "CosXL (EDM)",
    "edm_vpred.sigma_min": "CosXL (EDM)",
}
PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
ARCHITECTURES = {"sd": ("stable-diffusion-v1", "stable-diffusion-v2"), "sdxl": ("stable-diffusion-xl-v1",)}
NOT_TEXT_TO_IMAGE = ("inpaint", "edit", "refiner", "depth", "upscal", "lora", "controlnet")
ON_TOP = "give its base model here, and this file to `spo generate --lora` or generate.VARIANT.adapter"
UNUSED = (".loss.", "model_ema.")  # of an autoencoder's training


class Header:
    """Names, shapes and metadata of a file; no weights are read."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            ValueError: no safetensors file.
        """
        self.where = f"backbone.checkpoint: {path}"
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except Exception as error:  # safetensors raises several kinds
            raise ValueError(f"{self.where} is no readable safetensors file ({first_line(error)})") from None

    def count(self, prefix: str) -> int:
        return sum(1 for n in self.shapes if n.startswith(prefix) and not any(u in n for u in UNUSED))


def check(header: Header, settings: config.Backbone) -> None:
    """Refuse what is no whole text-to-image checkpoint of the family, in one line that says what it is.

    Raises:
        ValueError: a LoRA, a part alone, another family or architecture, or tensors missing or unknown.
    """
    _check_architecture(header, settings.family)
    _check_kind(header)
    other = "sdxl" if settings.family == "sd" else "sd"
    if any(header.count(p) for p in TEXT[other]) and not any(header.count(p) for p in TEXT[settings.family]):
        raise ValueError(f"{header.where} is of family {other!r}, but backbone.family is {settings.family!r}")
    if missing := [p for p in TEXT[settings.family] if not header.count(p)]:
        raise ValueError(
            f"{header.where} holds no text encoder ({missing[0]}*); give a diffusers folder instead"
        )
    if settings.vae is None and not header.count(VAE):
        raise ValueError(f"{header.where} holds no VAE ({VAE}*); name a VAE's folder in backbone.vae")
    _check_counts(header, settings)


def marks(header: Header, override: config.Scheduler) -> dict[str, Any]:
    """Scheduler keys that a file announces: `v_pred`, `ztsnr`, and the metadata modelspec.prediction_type.

    Args:
        override: of params.yaml; it settles marks that contradict each other.

    Raises:
        ValueError: EDM, another prediction type, or contradicting marks.
    """
    for name, kind in EDM.items():
        if name in header.shapes:
            reason = f"tensor {name!r} marks a model trained as {kind}"
            raise ValueError(f"{header.where}: {reason}; only discrete-time DDPM is supported")
    key = "modelspec.prediction_type"
    said = header.metadata.get(key)
    if said is not None and said.strip().lower() not in PREDICTION_TYPES and override.prediction_type is None:
        raise ValueError(f"{header.where}: metadata {key} {said!r} is not supported; epsilon and v are")
    found: dict[str, Any] = {}
    if said is not None and override.prediction_type is None:
        found["prediction_type"] = PREDICTION_TYPES[said.strip().lower()]
    if V_PREDICTION in header.shapes:
        if found.get("prediction_type", "v_prediction") != "v_prediction":
            raise ValueError(
                f"{header.where}: tensor 'v_pred' and metadata {key} {said!r} contradict each other; "
                "set backbone.scheduler.prediction_type"
            )
        found["prediction_type"] = "v_prediction"
    if ZERO_SNR in header.shapes:
        found["rescale_betas_zero_snr"] = True
    return found


def _check_architecture(header: Header, family: str) -> None:
    said = header.metadata.get("modelspec.architecture")
    if said is None:
        return
    name = said.lower()
    if any(kind in name for kind in NOT_TEXT_TO_IMAGE) or not name.startswith(ARCHITECTURES[family]):
        raise ValueError(
            f"{header.where}: metadata modelspec.architecture is {said!r}; backbone.family {family!r} takes "
            f"{' and '.join(ARCHITECTURES[family])}"
        )


def _check_kind(header: Header) -> None:
    if header.count(UNET):
        return
    names = list(header.shapes)
    if any("lora" in n or "hada_" in n or "lokr_" in n for n in names):
        what = f"an adapter; {ON_TOP}"
    elif any(n.startswith(("down_blocks.", "unet.down_blocks.", "input_blocks.")) for n in names):
        what = f"a UNet alone; {ON_TOP}"
    elif any(n.startswith(("encoder.down", "decoder.up")) for n in names):
        what = "a VAE alone; its diffusers folder goes to backbone.vae"
    else:
        what = f"no Stable Diffusion checkpoint (no {UNET}*)"
    raise ValueError(f"{header.where} is {what}")


def _check_counts(header: Header, settings: config.Backbone) -> None:
    """Names are one to one between the two formats for UNet and VAE, so their numbers must agree."""
    from spo.backbones import sizes

    unet, vae = sizes.empty_models(settings)
    parts = {"UNet": (UNET, unet)} | ({} if settings.vae else {"VAE": (VAE, vae)})
    for name, (prefix, model) in parts.items():
        has, needs = header.count(prefix), len(model.state_dict())
        if has != needs:
            raise ValueError(
                f"{header.where}: {has} tensors {prefix}* in the file, {needs} in the {name} that "
                f"{settings.described_by} describes; a damaged file, or backbone.config is of another model"
            )
