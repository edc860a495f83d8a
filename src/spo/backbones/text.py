"""Encode prompts to a UNet's conditioning: the only difference between Stable Diffusion 1.5 and XL."""

from collections.abc import Sequence
from typing import Any

import torch

from spo.backbones.description import latent_side
from spo.data.tokens import tokenize
from spo.runtime.transfer import send
from spo.types import Conditioning


class SdText:
    """Conditioning by the last hidden states of one CLIP. Its pooled output is for latent reward models."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.encoders, self.is_projected = [text_encoder], False
        self.pooled_width: int = text_encoder.config.hidden_size

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        tokens = tokenized(self.tokenizer, prompts, self.text_encoder)
        # some text encoders announce it; without a mask the UNet attends to the padding too
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        output = self.text_encoder(tokens.input_ids, attention_mask=mask)
        return Conditioning({"text": output.last_hidden_state, "pooled": output.pooler_output})

    @staticmethod
    def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
        """The keyword arguments of the UNet's forward."""
        return {"encoder_hidden_states": conditioning.tensors["text"]}


class SdxlText:
    """Conditioning by two CLIPs: concatenated penultimate hidden states, pooled projection of the second one,
    and time ids (original size, crop, target size; arXiv 2307.01952, Sec. 2.2)."""

    def __init__(
        self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], side: int, zeros: bool = True
    ) -> None:
        """
        Args:
            side: of the square images, in pixels.
            zeros: encode the empty prompt as zeros (`force_zeros_for_empty_prompt` of model_index.json).
        """
        self.tokenizers, self.encoders, self.zeros = tokenizers, list(text_encoders), zeros
        self.is_projected = True  # the pooled text, by the second encoder
        self.pooled_width: int = text_encoders[-1].config.projection_dim
        self.time_ids = [side, side, 0, 0, side, side]

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            output = encoder(tokenized(tokenizer, prompts, encoder).input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        text = torch.cat(states, dim=-1)
        mask = torch.tensor([float(p != "" or not self.zeros) for p in prompts], dtype=text.dtype)
        time_ids = torch.tensor([self.time_ids] * len(prompts), dtype=text.dtype)
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


def text_of(pipeline: Any, sdxl: bool) -> SdText | SdxlText:
    """The conditioning of a diffusers pipeline."""
    if not sdxl:
        return SdText(pipeline.tokenizer, pipeline.text_encoder)
    side = latent_side(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    zeros = pipeline.config.force_zeros_for_empty_prompt
    return SdxlText([pipeline.tokenizer, pipeline.tokenizer_2], encoders, side, zeros)


def tokenized(tokenizer: Any, prompts: Sequence[str], encoder: Any) -> Any:
    """Tokenize to input_ids and attention_mask int64 [B,L] on the encoder's device, padded and truncated.

    L is the encoder's length where a tokenizer has no `model_max_length`.
    """
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenize(tokenizer, prompts, length)
    for name, values in tokens.items():
        tokens[name] = send(values, encoder.device)
    return tokens
