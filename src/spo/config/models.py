"""Sections of the models: the backbone and the scorers."""

from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from spo.config.base import Guidance, Positive, Section

# default of backbone.config, by family: the repository whose configs describe a single-file checkpoint
SINGLE_FILE_CONFIG = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}

SectionT = TypeVar("SectionT", bound=Section)


class Scheduler(Section):
    """Overrides of the checkpoint's scheduler_config.json; null: as the file says."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None


class Backbone(Section):
    """The base model to be aligned."""

    family: Literal["sd", "sdxl", "sd3", "flux"]
    checkpoint: str  # a diffusers folder, a single .safetensors file or a hub id
    revision: str | None = None  # of a hub id: a commit hash
    variant: str | None = None  # of weight files, such as fp16 in model.fp16.safetensors; null: the only one
    config: str | None = None  # of a single file: the diffusers folder or hub id with its configs
    license: str | None = None  # of the base model, for the model cards of its fine-tunes
    vae: str | None = None  # folder or hub id of a replacement VAE (SDXL: the fp16-safe one)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    image_size: Positive | None = None  # the side of square images in pixels; null: the file's
    true_guidance: Guidance | None = None  # flux: classifier-free guidance beside `guidance`; null: none
    max_sequence_length: int | None = Field(
        default=None, ge=0, le=512
    )  # sd3, flux: T5's tokens; null: as diffusers
    scheduler: Scheduler = Scheduler()

    @model_validator(mode="after")
    def _of_family(self) -> Self:
        if self.true_guidance is not None and not self.guidance_is_input:
            raise ValueError(
                f"true_guidance is for flux; guidance of family {self.family!r} is classifier-free guidance "
                "already: set it to null"
            )
        if self.max_sequence_length is not None and self.family not in ("sd3", "flux"):
            raise ValueError(
                f"max_sequence_length is of T5, which family {self.family!r} lacks: set it to null"
            )
        if self.is_single_file and self.config is None and self.family not in SINGLE_FILE_CONFIG:
            raise ValueError(
                f"checkpoint: single files of family {self.family!r} are not read; give a diffusers folder "
                "or hub id"
            )
        return self

    @property
    def guidance_is_input(self) -> bool:
        """Whether the `guidance` of a section is an input of the model, and not classifier-free guidance."""
        return self.family == "flux"

    def classifier_free(self, section: SectionT) -> SectionT:
        """A section with the scale of classifier-free guidance as its `guidance`."""
        if not self.guidance_is_input:
            return section
        return section.model_copy(update={"guidance": self.true_guidance or 1.0})

    @property
    def is_single_file(self) -> bool:
        return self.checkpoint.lower().endswith(".safetensors")

    @property
    def described_by(self) -> str:
        """The folder or hub id with the config files and tokenizers."""
        if self.is_single_file:
            return self.config or SINGLE_FILE_CONFIG[self.family]
        return self.checkpoint
