"""CLIPTokenizers whose vocabulary is the world's: every word of a caption is one token."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 16  # the longest caption has 12 words
CLIP_MAX_LENGTH = 17  # and three of quality before it, in captions of the web


def save(words: list[str], folder: Path, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Learn byte-pair merges until every word is one token; save in CLIP's format and load again.

    All letters are in the vocabulary, so any other lower-case word can still be spelled. EOS has the
    highest id, since CLIP text models pool at the position of the highest token.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([*words, *string.ascii_lowercase], trainer)
    learned = json.loads(bpe.to_str())["model"]
    letters = [c + end for end in ("", "</w>") for c in string.ascii_lowercase]
    tokens = letters + sorted(t for t in learned["vocab"] if t not in letters)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=max_length
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def load(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)
