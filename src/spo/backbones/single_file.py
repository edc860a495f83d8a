"""Single-file checkpoints (.safetensors), with the tensor names of the original releases."""

from typing import Any

from spo import config
from spo.backbones.families import FAMILIES
from spo.data.weights import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
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
NOT_TEXT_TO_IMAGE = ("inpaint", "edit", "refiner", "depth", "upscal", "lora", "controlnet")
AS_ADAPTER = (
    "give an adapter or a UNet alone by `spo generate --lora` or `--unet`, or as generate.VARIANT.adapter, "
    "and its base model here"
)
UNUSED = (".loss.", "model_ema.")  # tensors of the autoencoder's training


def count(weights: Weights, prefix: str) -> int:
    """Count the tensors with a prefix, without UNUSED ones."""
    return sum(1 for n in weights.tensors if n.startswith(prefix) and not any(u in n for u in UNUSED))


def check(weights: Weights, settings: config.Backbone) -> None:
    """Refuse a file that is not a complete text-to-image checkpoint of the family."""
    where, family = f"backbone.checkpoint: {weights.file}", settings.family
    known, prefixes = FAMILIES[family].architectures, FAMILIES[family].text_prefixes
    if not prefixes:
        raise ValueError(
            f"{where}: single files of family {family!r} are not read; give a diffusers folder or hub id"
        )
    architecture = weights.metadata.get("modelspec.architecture", known[0])
    name = architecture.lower()
    if any(kind in name for kind in NOT_TEXT_TO_IMAGE) or not name.startswith(known):
        raise ValueError(
            f"{where}: metadata modelspec.architecture is {architecture!r}; backbone.family {family!r} takes "
            f"{' and '.join(known)}"
        )
    if not count(weights, UNET):
        raise ValueError(
            f"{where} is not a complete checkpoint (no {UNET}*); {AS_ADAPTER}; a VAE alone goes to "
            "backbone.vae, as a diffusers folder"
        )
    missing = [prefix for prefix in prefixes if not count(weights, prefix)]
    for other, facts in FAMILIES.items():
        if missing == list(prefixes) and any(count(weights, p) for p in facts.text_prefixes):
            raise ValueError(f"{where} is of family {other!r}, but backbone.family is {family!r}")
    if missing:
        raise ValueError(f"{where} has no text encoder ({missing[0]}*); give a diffusers folder")
    if settings.vae is None and not count(weights, VAE):
        raise ValueError(f"{where} has no VAE ({VAE}*); name a VAE's folder in backbone.vae")


def marks(weights: Weights, override: config.Scheduler) -> dict[str, Any]:
    """The scheduler keys that a file announces: `v_pred`, `ztsnr`, the metadata modelspec.prediction_type.

    Args:
        override: of params.yaml; takes precedence over marks that contradict each other.
    """
    where = f"backbone.checkpoint: {weights.file}"
    for name, kind in EDM.items():
        if name in weights.tensors:
            reason = f"tensor {name!r} marks a model trained as {kind}"
            raise ValueError(f"{where}: {reason}; only discrete-time DDPM is supported")
    key = "modelspec.prediction_type"
    value = weights.metadata.get(key)
    announced = None if value is None else PREDICTION_TYPES.get(value.strip().lower())
    if value is not None and announced is None and override.prediction_type is None:
        raise ValueError(
            f"{where}: metadata {key} {value!r} is not supported; only epsilon and v_prediction are"
        )
    keys: dict[str, Any] = {}
    if announced is not None and override.prediction_type is None:
        keys["prediction_type"] = announced
    if V_PREDICTION in weights.tensors:
        if keys.get("prediction_type", "v_prediction") != "v_prediction":
            raise ValueError(
                f"{where}: tensor 'v_pred' and metadata {key} {value!r} contradict each other; "
                "set backbone.scheduler.prediction_type"
            )
        keys["prediction_type"] = "v_prediction"
    if ZERO_SNR in weights.tensors:
        keys["rescale_betas_zero_snr"] = True
    return keys
