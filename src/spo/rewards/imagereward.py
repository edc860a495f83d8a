"""ImageReward (arXiv 2304.05977): a BLIP whose text attends to the image, and a head on its first token.

Reads the released ImageReward.pt and med_config.json into transformers' own BLIP classes.

Departures from the released code:
1. Weights that the score does not use (`blip.vision_proj`, `blip.text_proj`) are left out.
2. The centre crop rounds as in `pixels.preprocess`: one pixel off from the released transform when 4n + 3
   pixels are cut off. Square images are not cropped.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from spo import config
from spo.data import weights
from spo.data.tokens import tokenize
from spo.rewards.aesthetic import linear_head
from spo.rewards.scorer import BatchedScorer
from spo.runtime import hub

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward on the released training set
LENGTH = 35  # tokens of a prompt, start and end included
HEAD_WIDTH = 64  # of each attention head of the vision transformer, in the base and the large one
ADDED_TOKENS = ["[DEC]", "[ENC]"]  # BLIP's, after those of BERT
UNUSED = re.compile(r"blip\.(vision_proj\.|text_proj\.|text_encoder\.embeddings\.position_ids$)")
EYE = r"^blip\.visual_encoder\."
NAMES = (  # of the checkpoint, and of ImageRewardModel
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (EYE + r"cls_token$", "vision.embeddings.class_embedding"),
    (EYE + r"pos_embed$", "vision.embeddings.position_embedding"),
    (EYE + r"patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (EYE + r"blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (EYE + r"blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (EYE + r"blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (EYE + r"blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (EYE + r"norm\.", "vision.post_layernorm."),
)
# keys of med_config.json: those that the text encoder takes, those with one possible value, and those without
# effect on a score (the width of the image tokens is that of the weights)
TAKEN = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
FIXED = {
    "model_type": "bert",
    "add_type_embeddings": False,
    "add_cross_attention": True,
    "position_embedding_type": "absolute",
}
WITHOUT_EFFECT = (
    *("architectures", "attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range"),
    *("encoder_width", "type_vocab_size", "gradient_checkpointing", "transformers_version", "use_cache"),
)


class ImageRewardModel(nn.Module):
    """The BLIP and its head, without the normalisation of the reward."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_head(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw rewards [B] of preprocessed pixels [B,3,h,w] and token ids [B,T] with their mask."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
        )
        return self.head(text.last_hidden_state[:, 0])[:, 0]


class ImageReward(BatchedScorer):
    """ImageReward of images for prompts, of which the first 35 tokens count.

    About -2 to 2: 0 is the mean of the released training set.
    """

    name = "imagereward"

    def load(self, settings: config.ImageRewardConfig) -> None:
        self.model = load_model(settings).to(self.device)
        self.tokenizer = load_tokenizer(settings.tokenizer, self.model.text.config.vocab_size)

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = self.pixels(images)
        tokens = tokenize(self.tokenizer, prompts, LENGTH).to(self.device)
        return (self.model(pixels, tokens.input_ids, tokens.attention_mask) - MEAN) / STD


def load_model(settings: config.ImageRewardConfig) -> ImageRewardModel:
    """Load the released files, frozen and in fp32."""
    where = f"score.imagereward.checkpoint: {settings.checkpoint}"
    state = weights.load_state(hub.local(settings.checkpoint), where)
    vision, size = _vision_config({re.sub(EYE, "", name): value for name, value in state.items()}, where)
    weights.check_image_size(size, settings.image_size, "score.imagereward")
    model = ImageRewardModel(vision, _text_config(settings.med_config, vision.hidden_size))
    weights.fill(model, renamed(state), where)
    return model.eval().requires_grad_(False)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the checkpoint by their names in ImageRewardModel, in fp32; unknown ones keep theirs."""
    return {_renamed(name): value.float() for name, value in state.items() if not UNUSED.match(name)}


def _renamed(name: str) -> str:
    for pattern, new in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name


def load_tokenizer(name: str, vocabulary: int) -> BertTokenizer:
    """Load BERT's tokenizer with BLIP's two added tokens: as many as the text encoder has embeddings."""
    key = "score.imagereward.tokenizer"
    source = hub.split_revision(name)
    tokenizer = weights.load_tokenizer(BertTokenizer, *source, key, "vocab.txt or tokenizer.json")
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{key}: {name} has {len(tokenizer)} tokens with {' and '.join(ADDED_TOKENS)}, but the text "
            f"encoder {vocabulary} embeddings; give the tokenizer of bert-base-uncased"
        )
    return tokenizer


def _vision_config(state: Mapping[str, Tensor], where: str) -> tuple[BlipVisionConfig, int]:
    """The config of the vision transformer, by its weights since no file has it, and the image size."""
    needed = {"pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"}
    weights.check_keys(needed - state.keys(), (), where)
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    layers = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return vision, size


def _text_config(file: str, vision_width: int) -> BlipTextConfig:
    """The config of the text encoder, from med_config.json; a key is honoured or refused."""
    where = f"score.imagereward.med_config: {file}"
    content = weights.read_config(hub.local(file), "score.imagereward.med_config", TAKEN)
    for key, value in content.items():
        if key in FIXED and value != FIXED[key]:
            raise ValueError(f"{where}: {key} is {value!r}; only {FIXED[key]!r} is supported")
        if key not in (*TAKEN, *FIXED, *WITHOUT_EFFECT):
            raise ValueError(f"{where}: unknown key {key!r}; it must be the config of BLIP's BERT")
    try:
        return BlipTextConfig(
            **{k: content[k] for k in TAKEN}, encoder_hidden_size=vision_width, is_decoder=True
        )
    except Exception as error:  # the config's own types
        raise ValueError(f"{where}: {' '.join(str(error).split())[:200]}") from None
