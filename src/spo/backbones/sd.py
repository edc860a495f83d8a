"""Stable Diffusion 1.5, and 2 where its files announce it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from spo.backbones.family import QUANTIZED, Family, Rules, is_unset, tokenized
from spo.backbones.shared_start import shared_start
from spo.types import Conditioning


def _is_side(value: Any) -> bool:
    sides = list(value) if isinstance(value, list | tuple) else [value]
    return len(set(sides)) == 1 and len(sides) < 3 and type(sides[0]) is int and sides[0] > 0


class Sd(Family):
    """Conditioning by the last hidden states of one CLIP. Its pooled output is for latent reward models."""

    title = "Stable Diffusion"
    pipeline = "StableDiffusionPipeline"
    parts: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    rules: ClassVar[Rules] = (
        ("time_cond_proj_dim", is_unset, "a model distilled to few steps (LCM) is not supported"),
        ("class_embed_type", is_unset, "a UNet that takes class labels is not supported"),
        ("num_class_embeds", is_unset, "a UNet that takes class labels is not supported"),
        ("encoder_hid_dim_type", is_unset, "a UNet that takes image embeddings is not supported"),
        *QUANTIZED,
        ("sample_size", _is_side, "give the side of square latents (64 for SD 1.5, 128 for SDXL)"),
    )
    tokenizers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    given: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    scheduler: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    text_prefixes: ClassVar[tuple[str, ...]] = ("cond_stage_model.",)
    architectures: ClassVar[tuple[str, ...]] = ("stable-diffusion-v1", "stable-diffusion-v2")
    embeddings: ClassVar[str | None] = None  # the UNet's addition_embed_type

    def __init__(self, pipeline: Any) -> None:
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.encoders, self.is_projected = [self.text_encoder], False
        self.pooled_width: int = self.text_encoder.config.hidden_size

    @classmethod
    def latent_shape(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
        size = denoiser["sample_size"]
        side = size[0] if isinstance(size, list | tuple) else size
        return denoiser.get("in_channels", 4), side, side

    @classmethod
    def check(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any], place: str) -> None:
        """Refuse other inputs or outputs than those of a text-to-image UNet of the family."""
        announced = denoiser.get("addition_embed_type")
        if announced != cls.embeddings:
            raise ValueError(
                f"{place}: addition_embed_type is {announced!r}, but must be {cls.embeddings!r} for "
                f"{cls.__name__.lower()!r}"
            )
        inputs, outputs = denoiser.get("in_channels", 4), denoiser.get("out_channels", 4)
        if inputs != outputs:
            raise ValueError(
                f"{place}: in_channels {inputs}, out_channels {outputs}: a UNet for inpainting or editing, "
                "or one that predicts variances; give a text-to-image UNet"
            )

    @staticmethod
    def widths(pipeline: Any) -> dict[str, tuple[Any, int]]:
        given = pipeline.text_encoder.config.hidden_size
        return {"cross_attention_dim": (pipeline.unet.config.cross_attention_dim, given)}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        tokens = tokenized(self.tokenizer, prompts, self.text_encoder)
        # some text encoders announce it; without a mask the UNet attends to the padding too
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        output = self.text_encoder(tokens.input_ids, attention_mask=mask)
        return Conditioning({"text": output.last_hidden_state, "pooled": output.pooler_output})

    def run(
        self, denoiser: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int = 1
    ) -> Tensor:
        with shared_start(denoiser, len(x_t), copies):
            return denoiser(x_t, timesteps, return_dict=False, **self.unet_arguments(conditioning))[0]

    @staticmethod
    def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
        """The keyword arguments of the UNet's forward."""
        return {"encoder_hidden_states": conditioning.tensors["text"]}
