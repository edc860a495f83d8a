"""FLUX.1 dev and schnell: a transformer on rectified flow, with the pooled text of a CLIP, and T5.

dev is distilled from guided predictions: the guidance scale is an input of the transformer, and a sample
takes one prediction. schnell takes none. Classifier-free guidance on top is `backbone.true_guidance`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.backbones.family import QUANTIZED, Family, Rules, is_count, t5_states, tokenized
from spo.diffusion.announced import schedule_of
from spo.types import Conditioning, NoiseSchedule

T5_TOKENS = 512  # `max_sequence_length` of diffusers' pipeline
PATCH = 2  # side of a token in latents


class Flux(Family):
    """Latents are [B,C,h,w] outside, and tokens [B,hw/4,4C] for the transformer."""

    title = "FLUX.1"
    pipeline = "FluxPipeline"
    parts: ClassVar[Mapping[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    denoiser = "transformer"
    rules: ClassVar[Rules] = (
        *QUANTIZED,
        ("patch_size", lambda value: value in (None, 1), "only tokens of 2 x 2 latents (1) are supported"),
        (
            "guidance_embeds",
            lambda value: isinstance(value, bool | None),
            "give true (dev) or false (schnell)",
        ),
    )
    tokenizers: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    given: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    half_vae = False
    flow = True
    encodes_once = True
    is_projected = False

    def __init__(self, pipeline: Any) -> None:
        self.tokenizer, self.clip = pipeline.tokenizer, pipeline.text_encoder
        self.t5_tokenizer, self.t5 = pipeline.tokenizer_2, pipeline.text_encoder_2
        self.encoders = [self.clip, self.t5]
        self.pooled_width = self.clip.config.hidden_size

    @classmethod
    def latent_shape(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int]:
        side = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
        return denoiser.get("in_channels", 64) // PATCH**2, side, side

    @classmethod
    def schedule(
        cls, scheduler_config: Mapping[str, Any], steps: int, denoiser: Mapping[str, Any], side: int
    ) -> NoiseSchedule:
        return schedule_of(scheduler_config, steps, (side // PATCH) ** 2, last_sigma=1 / steps)

    @classmethod
    def check(cls, denoiser: Mapping[str, Any], vae: Mapping[str, Any], place: str) -> None:
        """Refuse other inputs or outputs than those of a text-to-image model, and odd sides."""
        inputs = denoiser.get("in_channels", 64)
        if denoiser.get("out_channels") not in (None, inputs) or inputs % PATCH**2:
            raise ValueError(
                f"{place}: in_channels {inputs}, out_channels {denoiser['out_channels']}: a transformer for "
                "inpainting or control; give a text-to-image model"
            )
        if not is_count(vae.get("sample_size")) or cls.latent_shape(denoiser, vae)[1] % PATCH:
            raise ValueError(
                f"{place}: sample_size of the VAE is {vae.get('sample_size')!r}; give the side of square "
                "images, a multiple of 16 (1024 for FLUX.1)"
            )

    @staticmethod
    def widths(pipeline: Any) -> dict[str, tuple[Any, int]]:
        announced = pipeline.transformer.config
        return {
            "joint_attention_dim": (announced.joint_attention_dim, pipeline.text_encoder_2.config.d_model),
            "pooled_projection_dim": (
                announced.pooled_projection_dim,
                pipeline.text_encoder.config.hidden_size,
            ),
        }

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        pooled = self.clip(tokenized(self.tokenizer, prompts, self.clip).input_ids).pooler_output
        text = t5_states(self.t5_tokenizer, self.t5, prompts, T5_TOKENS).to(pooled.dtype)
        return Conditioning({"text": text, "pooled": pooled})

    def guided(
        self, denoiser: Any, conditioning: Conditioning, guidance: float, true_guidance: float | None
    ) -> tuple[Conditioning, float]:
        """The guidance scale as a tensor [B] of the text, where the transformer takes one."""
        if denoiser.config.guidance_embeds:
            text = conditioning.tensors["text"]
            scale = torch.full((len(text),), guidance, device=text.device)
            conditioning = Conditioning({**conditioning.tensors, "guidance": scale})
        elif guidance > 1:
            raise ValueError(
                f"guidance is {guidance:g}, but the base takes none (guidance_embeds is false, as in FLUX.1 "
                "schnell); set it to 1"
            )
        return conditioning, true_guidance or 1.0

    def run(
        self, denoiser: Any, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning, copies: int = 1
    ) -> Tensor:
        rows, columns = (side // PATCH for side in x_t.shape[-2:])
        text = conditioning.tensors["text"]
        output = denoiser(
            F.pixel_unshuffle(x_t, PATCH).flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=conditioning.tensors.get("guidance"),
            encoder_hidden_states=text,
            pooled_projections=conditioning.tensors["pooled"],
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=_positions(rows, columns, x_t.device),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each token [rows * columns, 3], fp32."""
    sides = (torch.arange(n, dtype=torch.float32, device=device) for n in (1, rows, columns))
    return torch.cartesian_prod(*sides)
