"""Stable Diffusion XL (arXiv 2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from spo.backbones.family import tokenized
from spo.backbones.sd import Sd
from spo.runtime.transfer import send
from spo.types import Conditioning


class Sdxl(Sd):
    """Conditioning by two CLIPs: concatenated penultimate hidden states, pooled projection of the second one,
    and time ids (original size, crop, target size; arXiv 2307.01952, Sec. 2.2)."""

    title = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    parts: ClassVar[Mapping[str, str]] = {**Sd.parts, "text_encoder_2": "CLIPTextModelWithProjection"}
    tokenizers: ClassVar[Mapping[str, str]] = {**Sd.tokenizers, "text_encoder_2": "tokenizer_2"}
    given: ClassVar[Mapping[str, Any]] = {}
    half_vae = False
    scheduler: ClassVar[Mapping[str, Any]] = {}
    text_prefixes = ("conditioner.embedders.0.", "conditioner.embedders.1.")
    architectures = ("stable-diffusion-xl-v1",)
    embeddings = "text_time"

    def __init__(self, pipeline: Any) -> None:
        self.tokenizers_of = [pipeline.tokenizer, pipeline.tokenizer_2]
        self.encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        # whether the empty prompt is encoded as zeros, as model_index.json says
        self.zeros = pipeline.config.force_zeros_for_empty_prompt
        self.is_projected = True  # the pooled text, by the second encoder
        self.pooled_width = pipeline.text_encoder_2.config.projection_dim

    @staticmethod
    def widths(pipeline: Any) -> dict[str, tuple[Any, int]]:
        unet, first, second = (
            part.config for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        )
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        return {
            "cross_attention_dim": (unet.cross_attention_dim, first.hidden_size + second.hidden_size),
            "projection_class_embeddings_input_dim": (pooled, second.projection_dim),
        }

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers_of, self.encoders, strict=True):
            output = encoder(tokenized(tokenizer, prompts, encoder).input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        text = torch.cat(states, dim=-1)
        mask = torch.tensor([float(p != "" or not self.zeros) for p in prompts], dtype=text.dtype)
        side = self.image_side
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), dtype=text.dtype)
        mask, time_ids = send(mask, text.device), send(time_ids, text.device)
        return Conditioning(
            {"text": text * mask.view(-1, 1, 1), "pooled": pooled * mask.view(-1, 1), "time_ids": time_ids}
        )

    @staticmethod
    def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
        """The keyword arguments of the UNet's forward."""
        tensors = conditioning.tensors
        added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
        return {"encoder_hidden_states": tensors["text"], "added_cond_kwargs": added}
