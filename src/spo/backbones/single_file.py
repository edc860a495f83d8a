"""Single-file checkpoints (.safetensors), with the tensor names of the original releases."""

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
# Empty tensors with which trainers and user interfaces mark a file.
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
AS_ADAPTER = (
    "give an adapter or a UNet alone by `spo generate --lora` or `--unet`, or as generate.VARIANT.adapter, "
    "and its base model here"
)
UNUSED = (".loss.", "model_ema.")  # tensors of the autoencoder's training


class Header:
    """Tensor names and metadata of a file; no weights are read."""

    def __init__(self, path: str) -> None:
        self.where = f"backbone.checkpoint: {path}"
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                self.names = list(file.keys())
        except Exception as error:  # safetensors raises several types
            reason = first_line(error)
            raise ValueError(f"{self.where} is not a readable safetensors file ({reason})") from None

    def count(self, prefix: str) -> int:
        """Count the tensors with a prefix, without UNUSED ones."""
        return sum(1 for n in self.names if n.startswith(prefix) and not any(u in n for u in UNUSED))


def check(header: Header, settings: config.Backbone) -> None:
    """Refuse a file that is not a complete text-to-image checkpoint of the family."""
    _check_architecture(header, settings.family)
    if not header.count(UNET):
        raise ValueError(
            f"{header.where} is not a complete checkpoint (no {UNET}*); {AS_ADAPTER}; a VAE alone goes to "
            "backbone.vae, as a diffusers folder"
        )
    other = "sdxl" if settings.family == "sd" else "sd"
    if any(header.count(p) for p in TEXT[other]) and not any(header.count(p) for p in TEXT[settings.family]):
        raise ValueError(f"{header.where} is of family {other!r}, but backbone.family is {settings.family!r}")
    if missing := [p for p in TEXT[settings.family] if not header.count(p)]:
        raise ValueError(
            f"{header.where} has no text encoder ({missing[0]}*); give a diffusers folder instead"
        )
    if settings.vae is None and not header.count(VAE):
        raise ValueError(f"{header.where} has no VAE ({VAE}*); name a VAE's folder in backbone.vae")


def marks(header: Header, override: config.Scheduler) -> dict[str, Any]:
    """The scheduler keys that a file announces: `v_pred`, `ztsnr`, the metadata modelspec.prediction_type.

    Args:
        override: of params.yaml; takes precedence over marks that contradict each other.
    """
    for name, kind in EDM.items():
        if name in header.names:
            reason = f"tensor {name!r} marks a model trained as {kind}"
            raise ValueError(f"{header.where}: {reason}; only discrete-time DDPM is supported")
    key = "modelspec.prediction_type"
    value = header.metadata.get(key)
    announced = None if value is None else PREDICTION_TYPES.get(value.strip().lower())
    if value is not None and announced is None and override.prediction_type is None:
        raise ValueError(
            f"{header.where}: metadata {key} {value!r} is not supported; only epsilon and v_prediction are"
        )
    keys: dict[str, Any] = {}
    if announced is not None and override.prediction_type is None:
        keys["prediction_type"] = announced
    if V_PREDICTION in header.names:
        if keys.get("prediction_type", "v_prediction") != "v_prediction":
            raise ValueError(
                f"{header.where}: tensor 'v_pred' and metadata {key} {value!r} contradict each other; "
                "set backbone.scheduler.prediction_type"
            )
        keys["prediction_type"] = "v_prediction"
    if ZERO_SNR in header.names:
        keys["rescale_betas_zero_snr"] = True
    return keys


def _check_architecture(header: Header, family: str) -> None:
    architecture = header.metadata.get("modelspec.architecture")
    if architecture is None:
        return
    name = architecture.lower()
    if any(kind in name for kind in NOT_TEXT_TO_IMAGE) or not name.startswith(ARCHITECTURES[family]):
        raise ValueError(
            f"{header.where}: metadata modelspec.architecture is {architecture!r}; backbone.family "
            f"{family!r} takes {' and '.join(ARCHITECTURES[family])}"
        )
