"""The step-aware preference model (SPM; arXiv 2406.04314, Sec. 4.2): a timestep-conditioned CLIP.

Every vision layer, and the pooled output, is modulated by adaLN (arXiv 2212.09748) of the timestep;
modulation starts as the identity, so that training starts from the CLIP as it is.

Departures from the official code:
1. Scores are computed row by row; the official scorer does the same, its trainer scores N x N.
2. Text features are separate from images, so that a rollout computes them once a prompt.
3. `step_condition=False` is the same CLIP without modulation, for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from spo.data import weights
from spo.data.images import CLIP_MEAN, CLIP_STD
from spo.data.preprocessing import OPENAI, announced
from spo.data.tokens import tokenize
from spo.preference import checkpoint as checkpoint_files
from spo.preference.checkpoint import CONFIG, WEIGHTS
from spo.runtime import hub
from spo.runtime.files import read_json
from spo.runtime.transfer import send
from spo.types import Candidates, Conditioning

FREQUENCIES = 256  # sinusoids of the timestep
# modules trained by `preference.trained: heads`, with the step condition
HEADS = ("visual_projection", "text_projection", "final_layer_norm", "post_layernorm", "logit_scale")
STEP_CONDITION = ("adaLN_modulation", "t_embedder")


class StepAwarePreferenceModel(nn.Module):
    """CLIP's text and vision towers with a timestep-modulated vision tower."""

    model: Any  # a CLIPModel with modules added
    _mean: Tensor
    _std: Tensor

    def __init__(self, clip: Any, step_condition: bool = True) -> None:
        super().__init__()
        self.model, self.step_condition = clip, step_condition
        self._checkpointed = False
        size: Any = clip.config.vision_config.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.register_buffer("_mean", CLIP_MEAN.view(1, 3, 1, 1).clone(), persistent=False)
        self.register_buffer("_std", CLIP_STD.view(1, 3, 1, 1).clone(), persistent=False)
        if step_condition:
            _add_modulation(clip)

    @classmethod
    def from_clip(
        cls, name: str, step_condition: bool = True, revision: str | None = None
    ) -> StepAwarePreferenceModel:
        """Load any CLIP-format folder or hub id in fp32, with modulation at identity."""
        model = cls(weights.load_clip(name, revision, "preference.init"), step_condition)
        own = announced(name, revision, model.image_size, "preference.init")
        if not all(map(torch.equal, own, OPENAI)):
            raise ValueError(
                f"preference.init: {name} announces another image_mean or image_std than OpenAI's CLIP; "
                "the step-aware model supports only these"
            )
        return model

    @classmethod
    def from_official_checkpoint(cls, path: str | Path, config: CLIPConfig) -> StepAwarePreferenceModel:
        """Load a released `*_step-aware_preference_model.bin`; `config` is that of its CLIP."""
        state = weights.load_state(Path(path), str(path))
        state = {k: v.float() for k, v in state.items() if not k.endswith("position_ids")}
        model = cls(CLIPModel(config))
        weights.fill(model, state, str(path))
        return model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> StepAwarePreferenceModel:
        """Load a folder written by `save_pretrained`."""
        folder = Path(folder)
        checkpoint_files.check_folder(folder, "preference model", "spo preference")
        settings = read_json(folder / CONFIG, "preference model")
        step_condition = settings.pop("step_condition", True)
        model = cls(CLIPModel(CLIPConfig.from_dict(settings)), step_condition)
        where = str(folder / WEIGHTS)
        state = weights.load_state(folder / WEIGHTS, where)
        weights.fill(model, {f"model.{k}": v.float() for k, v in state.items()}, where)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors: CLIPModel's keys and those of the modulation."""
        settings = {**self.model.config.to_dict(), "step_condition": self.step_condition}
        settings.pop("_name_or_path", None)  # a path of this machine
        checkpoint_files.save(Path(folder), self.model.state_dict(), settings)

    def set_logit_scale(self, logit_scale: float) -> None:
        """Set exp(logit_scale).

        A CLIP is sharper than noisy labels can be; training on few pairs would first flatten its features
        (in scenes, the accuracy on right against wrong colours fell from 100 to 57 %).
        """
        self.model.logit_scale.data.fill_(math.log(logit_scale))

    def train_heads(self) -> None:
        """Freeze all but projections, last norms, scale and step condition.

        Full fine-tuning overfits small label sets (log loss on held-out pairs of scenes .667, heads .661).
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in (*HEADS, *STEP_CONDITION)))

    def checkpoint_gradients(self) -> None:
        """Recompute the activations inside the layers in the backward pass instead of storing them."""
        self._checkpointed = True
        self.model.text_model.gradient_checkpointing_enable()

    def score(self, images: Tensor, input_ids: Tensor, timesteps: Tensor) -> Tensor:
        """Return exp(logit_scale) * cos [B] of images [B,3,H,W] in [-1,1] and their own texts int64 [B,L]."""
        return self.score_features(images, self.encode_text(input_ids), timesteps)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Normalised text features [B,D]."""
        pooled = self.model.text_model(input_ids=input_ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def score_features(self, images: Tensor, text: Tensor, timesteps: Tensor) -> Tensor:
        """As `score`, with text features [B,D] of `encode_text`."""
        image = F.normalize(self.encode_image(images, timesteps), dim=-1)
        return self.model.logit_scale.exp() * (image * text).sum(-1)

    def encode_image(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """Projected image features [B,D], not normalised."""
        vision = self.model.vision_model
        recompute = self._checkpointed and self.training
        hidden = vision.pre_layrnorm(vision.embeddings(self._pixels(images)))
        condition = self.model.t_embedder(timesteps) if self.step_condition else None
        for layer in vision.encoder.layers:
            if recompute:
                hidden = checkpoint(_layer, layer, hidden, condition, use_reentrant=False)
            else:
                hidden = _layer(layer, hidden, condition)
        pooled = vision.post_layernorm(hidden[:, 0])
        if condition is not None:
            shift, scale = vision.adaLN_modulation(condition).chunk(2, dim=-1)
            pooled = pooled * (1 + scale) + shift
        return self.model.visual_projection(pooled)

    def _pixels(self, images: Tensor) -> Tensor:
        """Fit, clamp and normalise images."""
        return ((self.fitted(images) / 2 + 0.5).clamp(0, 1) - self._mean) / self._std

    def fitted(self, images: Tensor) -> Tensor:
        """Resize the shortest side (bicubic, no antialias), crop the centre: [B,3,image_size,image_size]."""
        images = images.to(self._mean)
        height, width = images.shape[-2:]
        scale = self.image_size / min(height, width)
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        if size != (height, width):
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        top, left = (round((side - self.image_size) / 2) for side in size)
        return images[..., top : top + self.image_size, left : left + self.image_size]


class TimestepEmbedder(nn.Module):
    """Embeds timesteps [B] as [B,width]: sinusoids and a small MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        for linear in (first, last):
            nn.init.normal_(linear.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * index / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.parameters()).dtype))


class ClipRewardModel:
    """A trained model and its tokenizer as a `types.RewardModel`: fp32, no gradients."""

    needs_images = True

    def __init__(self, model: StepAwarePreferenceModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        text = self.model.encode_text(token_ids(self.tokenizer, prompts, self.model))
        return Conditioning({"text": text})

    @torch.no_grad()
    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        assert candidates.images is not None
        return self.model.score_features(candidates.images, text.tensors["text"], candidates.timesteps)


def load_reward_model(folder: str | Path, device: torch.device | str) -> ClipRewardModel:
    """The output of the stage `preference`."""
    model = StepAwarePreferenceModel.from_pretrained(folder).to(device)
    return ClipRewardModel(model, load_tokenizer(str(folder)))


def clip_config(name: str, revision: str | None) -> Any:
    """Read the config of a CLIP's folder or hub id, without its weights."""
    how: dict[str, Any] = {"revision": revision}
    return hub.reach(f"preference.init: {name}", name, lambda: CLIPConfig.from_pretrained(name, **how))


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a CLIP's folder or hub id."""
    return hub.reach(
        f"{name}: tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, revision=revision)
    )


def token_ids(tokenizer: Any, prompts: Sequence[str], model: StepAwarePreferenceModel) -> Tensor:
    """int64 [B,L] on the model's device, padded and cut to the length the text tower takes."""
    length = model.model.config.text_config.max_position_embeddings
    return send(tokenize(tokenizer, prompts, length).input_ids, model.model.logit_scale.device)


def _layer(layer: Any, hidden: Tensor, condition: Tensor | None) -> Tensor:
    """Run a vision layer of CLIP; with a condition [B,d], each half is shifted, scaled and gated by it."""
    if condition is None:
        attended = layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)[0]
        hidden = hidden + attended
        return hidden + layer.mlp(layer.layer_norm2(hidden))
    modulation = layer.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
    x = layer.layer_norm1(hidden) * (1 + scale_attention) + shift_attention
    hidden = hidden + gate_attention * layer.self_attn(x, attention_mask=None)[0]
    x = layer.layer_norm2(hidden) * (1 + scale_mlp) + shift_mlp
    return hidden + gate_mlp * layer.mlp(x)


def _add_modulation(clip: Any) -> None:
    """Add modules under the official names, at identity: shift and scale 0, gate 1."""
    vision, width = clip.vision_model, clip.config.vision_config.hidden_size
    clip.t_embedder = TimestepEmbedder(width)
    for layer in vision.encoder.layers:
        layer.adaLN_modulation = _zero_linear(width, 6)
        with torch.no_grad():
            bias = layer.adaLN_modulation[1].bias.view(6, width)
            bias[2], bias[5] = 1, 1  # the gates
    vision.adaLN_modulation = _zero_linear(width, 2)


def _zero_linear(width: int, parts: int) -> nn.Sequential:
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)
