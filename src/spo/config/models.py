"""Sections of the models: the backbone and the scorers."""

from typing import Literal

from spo.config.base import Section

# default of backbone.config, by family: the repository whose configs describe a single-file checkpoint
SINGLE_FILE_CONFIG = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


class Scheduler(Section):
    """Overrides of the checkpoint's scheduler_config.json; null: as the file says."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None


class Backbone(Section):
    """The base model to be aligned."""

    family: Literal["sd", "sdxl"]
    checkpoint: str  # a diffusers folder, a single .safetensors file or a hub id
    revision: str | None = None  # of a hub id: a commit hash
    variant: str | None = None  # of weight files, such as fp16 in model.fp16.safetensors; null: the only one
    config: str | None = None  # of a single file: the diffusers folder or hub id with its configs
    license: str | None = None  # of the base model, for the model cards of its fine-tunes
    vae: str | None = None  # folder or hub id of a replacement VAE (SDXL: the fp16-safe one)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    scheduler: Scheduler = Scheduler()

    @property
    def is_single_file(self) -> bool:
        return self.checkpoint.lower().endswith(".safetensors")

    @property
    def described_by(self) -> str:
        """The folder or hub id with the config files and tokenizers."""
        if self.is_single_file:
            return self.config or SINGLE_FILE_CONFIG[self.family]
        return self.checkpoint
