"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer on rectified flow, with two CLIPs and T5."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.backbones.family import QUANTIZED, Family, Rules, is_count, t5_states, tokenized
from spo.diffusion.announced import schedule_of
from spo.types import Conditioning, NoiseSchedule

T5_TOKENS = 256  # `max_sequence_length` of diffusers' pipeline


class Sd3(Family):
    """The text is the penultimate states of both CLIPs side by side, padded to T5's width, then T5's states;
    pooled are both CLIPs' projections. Without T5 its states are zeros, as in diffusers."""

    title = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    optional = ("text_encoder_3",)
    denoiser = "transformer"
    rules: ClassVar[Rules] = (
        *QUANTIZED,
        ("sample_size", is_count, "give the side of square latents (128 for SD 3.5)"),
        ("patch_size", is_count, "give the side of a token in latents (2 for SD 3.5)"),
        ("pos_embed_max_size", is_count, "give the largest side in tokens (192 for SD 3, 384 for SD 3.5)"),
    )
    tokenizers: ClassVar[Mapping[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    given: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    flow = True
    encodes_once = True
    is_projected = True

    def __init__(self, pipeline: Any) -> None:
        self.clips = [
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ]
        self.t5_tokenizer, self.t5 = pipeline.tokenizer_3, pipeline.text_encoder_3
        self.encoders = [encoder for _, encoder in self.clips] + ([self.t5] if self.t5 is not None else [])
        self.pooled_width = sum(encoder.config.projection_dim for _, encoder in self.clips)
        self.width: int = pipeline.transformer.config.joint_attention_dim

    @classmethod
    def latent_shape(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
        return denoiser.get("in_channels", 16), denoiser["sample_size"], denoiser["sample_size"]

    @classmethod
    def schedule(
        cls, scheduler_config: Mapping[str, Any], steps: int, denoiser: Mapping[str, Any], side: int
    ) -> NoiseSchedule:
        return schedule_of(scheduler_config, steps, (side // denoiser["patch_size"]) ** 2)

    @classmethod
    def check(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any], place: str) -> None:
        """Refuse latents that are not whole tokens, more tokens than positions, and other outputs."""
        side, patch, most = (denoiser[key] for key in ("sample_size", "patch_size", "pos_embed_max_size"))
        if side % patch or side // patch > most:
            raise ValueError(
                f"{place}: sample_size {side} must be a multiple of patch_size {patch}, and at most "
                f"{most} times as large (pos_embed_max_size)"
            )
        inputs = denoiser.get("in_channels", 16)
        outputs = denoiser.get("out_channels", 16) or inputs
        if inputs != outputs:
            raise ValueError(
                f"{place}: in_channels {inputs}, out_channels {outputs}: a transformer for inpainting or "
                "control; give a text-to-image model"
            )

    @staticmethod
    def widths(pipeline: Any) -> dict[str, tuple[Any, int]]:
        announced = pipeline.transformer.config
        clips = [pipeline.text_encoder.config, pipeline.text_encoder_2.config]
        clip, t5 = sum(c.hidden_size for c in clips), pipeline.text_encoder_3
        joint = announced.joint_attention_dim if t5 is None else t5.config.d_model
        return {
            "joint_attention_dim": (announced.joint_attention_dim, max(joint, clip)),
            "pooled_projection_dim": (
                announced.pooled_projection_dim,
                sum(c.projection_dim for c in clips),
            ),
        }

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        outputs = [
            encoder(tokenized(tokenizer, prompts, encoder).input_ids, output_hidden_states=True)
            for tokenizer, encoder in self.clips
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None:
            t5 = clip.new_zeros(len(prompts), T5_TOKENS, self.width)
        else:
            t5 = t5_states(self.t5_tokenizer, self.t5, prompts, T5_TOKENS).to(clip.dtype)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return Conditioning({"text": torch.cat([clip, t5], dim=1), "pooled": pooled})

    def run(
        self, denoiser: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int = 1
    ) -> Tensor:
        output: Tensor = denoiser(
            x_t,
            timestep=timesteps,
            encoder_hidden_states=conditioning.tensors["text"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]
        return output
