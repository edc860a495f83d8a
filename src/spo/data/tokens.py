"""Prompts to token ids, the same way for every text encoder."""

from collections.abc import Sequence
from typing import Any


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """input_ids and attention_mask int64 [B,length] of a transformers tokenizer, padded and truncated."""
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
