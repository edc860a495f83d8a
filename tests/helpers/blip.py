"""A small random checkpoint in the format of ImageReward.pt, and the released forward pass in plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from spo import config

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "##s"]
VISION, TEXT, PATCH, SIZE, LAYERS = 128, 32, 16, 48, 2  # 128: two attention heads of 64
MED_CONFIG = {  # the keys of the released file
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 4 * TEXT,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released weights, at the sizes above."""
    found: dict[str, tuple[int, ...]] = {}

    def affine(name: str, into: int, out: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    found[f"{eye}.cls_token"] = (1, 1, VISION)
    found[f"{eye}.pos_embed"] = (1, 1 + (SIZE // PATCH) ** 2, VISION)
    found[f"{eye}.patch_embed.proj.weight"] = (VISION, 3, PATCH, PATCH)
    found[f"{eye}.patch_embed.proj.bias"] = (VISION,)
    for i in range(LAYERS):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", VISION), norm(f"{block}.norm2", VISION)
        affine(f"{block}.attn.qkv", VISION, 3 * VISION), affine(f"{block}.attn.proj", VISION, VISION)
        affine(f"{block}.mlp.fc1", VISION, 4 * VISION), affine(f"{block}.mlp.fc2", 4 * VISION, VISION)
    norm(f"{eye}.norm", VISION)
    found[f"{bert}.embeddings.word_embeddings.weight"] = (MED_CONFIG["vocab_size"], TEXT)
    found[f"{bert}.embeddings.position_embeddings.weight"] = (MED_CONFIG["max_position_embeddings"], TEXT)
    norm(f"{bert}.embeddings.LayerNorm", TEXT)
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        for part, width in (("attention", TEXT), ("crossattention", VISION)):
            affine(f"{layer}.{part}.self.query", TEXT, TEXT)
            affine(f"{layer}.{part}.self.key", width, TEXT), affine(f"{layer}.{part}.self.value", width, TEXT)
            affine(f"{layer}.{part}.output.dense", TEXT, TEXT), norm(f"{layer}.{part}.output.LayerNorm", TEXT)
        affine(f"{layer}.intermediate.dense", TEXT, 4 * TEXT)
        affine(f"{layer}.output.dense", 4 * TEXT, TEXT), norm(f"{layer}.output.LayerNorm", TEXT)
    sizes = (TEXT, 1024, 128, 64, 16, 1)
    for key, into, out in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        affine(f"mlp.layers.{key}", into, out)
    affine("blip.vision_proj", VISION, 256), affine("blip.text_proj", TEXT, 256)
    return found


def random_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes().items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[name] = scale * torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
            state[name] += 1
    ids = torch.arange(MED_CONFIG["max_position_embeddings"])[None]
    return {**state, "blip.text_encoder.embeddings.position_ids": ids}


def save(folder: Path, seed: int = 0) -> config.ImageRewardConfig:
    """Write ImageReward.pt, med_config.json and a tokenizer of BERT's kind."""
    (folder / "bert").mkdir(parents=True, exist_ok=True)
    torch.save(random_state(seed), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    (folder / "bert/vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "bert/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return config.ImageRewardConfig(
        checkpoint=str(folder / "ImageReward.pt"),
        med_config=str(folder / "med_config.json"),
        tokenizer=str(folder / "bert"),
        image_size=SIZE,
    )


class Reference:
    """The released forward pass by the checkpoint's own names, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {k: v.double() for k, v in state.items()}

    def affine(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None] == 0, -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def image(self, pixels: Tensor) -> Tensor:
        eye = "blip.visual_encoder"
        weight, bias = (self.state[f"{eye}.patch_embed.proj.{k}"] for k in ("weight", "bias"))
        x = conv2d(pixels, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        cls = self.state[f"{eye}.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1) + self.state[f"{eye}.pos_embed"]
        for i in range(LAYERS):
            block = f"{eye}.blocks.{i}"
            q, k, v = self.affine(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.affine(f"{block}.attn.proj", self.attend(q, k, v, VISION // 64))
            hidden = gelu(self.affine(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.affine(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{eye}.norm", x, 1e-6)

    def text(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        bert, eps, heads = "blip.text_encoder", 1e-12, MED_CONFIG["num_attention_heads"]
        x = self.state[f"{bert}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{bert}.embeddings.LayerNorm", x, eps)
        for i in range(LAYERS):
            layer = f"{bert}.encoder.layer.{i}"
            for part, source, hidden in (("attention", None, mask), ("crossattention", image, None)):
                own = f"{layer}.{part}.self"
                q, k, v = (
                    self.affine(f"{own}.{n}", x if n == "query" or source is None else source)
                    for n in ("query", "key", "value")
                )
                out = self.affine(f"{layer}.{part}.output.dense", self.attend(q, k, v, heads, hidden))
                x = self.norm(f"{layer}.{part}.output.LayerNorm", x + out, eps)
            out = self.affine(f"{layer}.output.dense", gelu(self.affine(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + out, eps)
        return x

    def reward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.text(ids, mask, self.image(pixels.double()))[:, 0]
        for key in (0, 2, 4, 6, 7):
            x = self.affine(f"mlp.layers.{key}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
