"""Prompts to what a UNet is told: all that differs between Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spo.types import Conditioning


class SdText:
    """One CLIP: its last hidden states."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        ids = token_ids(self.tokenizer, prompts).to(self.text_encoder.device)
        return Conditioning({"text": self.text_encoder(ids).last_hidden_state})

    @staticmethod
    def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
        return {"encoder_hidden_states": conditioning.tensors["text"]}


class SdxlText:
    """Two CLIPs: their penultimate hidden states side by side, the second one's pooled projection, and
    the time ids (original size, crop, target size; arXiv 2307.01952, Sec. 2.2)."""

    def __init__(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], side: int) -> None:
        """`side`: of the square pictures, in pixels."""
        self.tokenizers, self.text_encoders = tokenizers, text_encoders
        self.time_ids = [side, side, 0, 0, side, side]

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = token_ids(tokenizer, prompts).to(encoder.device)
            told = encoder(ids, output_hidden_states=True)
            states.append(told.hidden_states[-2])
            pooled = told[0]
        # as diffusers' pipeline with force_zeros_for_empty_prompt: the empty prompt is all zeros
        said = torch.tensor([float(p != "") for p in prompts], device=states[0].device)
        assert pooled is not None
        text = torch.cat(states, dim=-1)
        time_ids = torch.tensor([self.time_ids] * len(prompts), dtype=text.dtype, device=text.device)
        said = said.to(text.dtype)
        return Conditioning(
            {"text": text * said.view(-1, 1, 1), "pooled": pooled * said.view(-1, 1), "time_ids": time_ids}
        )

    @staticmethod
    def unet_arguments(conditioning: Conditioning) -> dict[str, Any]:
        told = conditioning.tensors
        added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]}
        return {"encoder_hidden_states": told["text"], "added_cond_kwargs": added}


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """int64 [B,L], padded and cut to the tokenizer's length."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
