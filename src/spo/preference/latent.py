"""The latent reward model (LRM; arXiv 2502.01051, Sec. 3): the base's own denoiser scores noisy latents.

A UNet's down and mid blocks run on x_t at t; their states are averaged over h and w, concatenated and
projected. Of a transformer the first three quarters of the blocks run, and the image tokens are averaged.
Nothing is predicted or decoded, so that early steps can be scored too.

Departures from the paper (P) or the official code (C):
1. P does not say which state of a down block is averaged; C takes the residuals at indices 2, 5, 8 (and 11),
   which are the states after each block's last layer, before its downsampler. So do we.
2. The empty prompt of the visual feature enhancement (VFE) is the base's own unconditional text: zeros where
   SDXL's model_index.json says so.
3. Where the base has a text encoder without projection (SD 1.5), C starts from the projection of
   openai/clip-vit-large-patch14, which `text_projection` names; without it, ours starts as the identity.
4. `trained: heads` or `lora` leave the UNet and the text encoders as they are (`all`, as published, trains
   them).
5. P saves the checkpoint with the best validation accuracy; here it is the last weights, which `ema` may
   average. P's linear decay of the learning rate is `optimizer.decay: linear`.
6. Official checkpoints (released.py) encode the empty prompt of SDXL too: `encodes_empty_prompt`.

Of transformers P says only "layer 18 of the MMDiT" (of 24) for SD 3, and that all text encoders are used; no
code is public. Ours is: for every transformer three quarters of its blocks, rounded up, FLUX's joint and
single ones counted together; VFE on that one feature; as text the base's pooled one (both projections of
SD 3, CLIP's pooled state of FLUX); the guidance scale that FLUX takes as an input is 1. `trained: all`
leaves the text encoders as they are.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo.backbones.features import FirstPart
from spo.config import LatentPreference
from spo.data import weights
from spo.diffusion.denoiser import is_guided
from spo.preference import checkpoint
from spo.preference.checkpoint import CONFIG, WEIGHTS
from spo.runtime.files import read_json
from spo.types import Backbone, Candidates, Conditioning

EMPTY = "empty "  # prefix of the empty prompt's tensors in a Conditioning
PROBE_TOLERANCE = 0.03  # of the probe's norm; fp16 and bf16 change a VAE's latents by less


class LatentPreferenceModel(nn.Module):
    """The first part of a base's denoiser with a head on its pooled features."""

    def __init__(
        self, encoder: FirstPart, feature_guidance: float, encodes_empty_prompt: bool = False
    ) -> None:
        """
        Args:
            encoder: its weights become part of the model.
            feature_guidance: of the VFE, above 1; else the features of the prompt alone.
            encodes_empty_prompt: whether the empty prompt is text as any other, not the base's zeros.
        """
        super().__init__()
        self.encoder: Any = encoder
        self.encodes_empty_prompt = encodes_empty_prompt
        if encodes_empty_prompt:
            encoder.encode_empty_prompt()
        self.feature_guidance = feature_guidance
        self.visual_projection = nn.Linear(encoder.width, encoder.text_width, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=0.02)
        self.text_projection: nn.Linear | None = None
        if not encoder.text_is_projected:
            self.text_projection = nn.Linear(encoder.text_width, encoder.text_width, bias=False)
            nn.init.eye_(self.text_projection.weight)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @torch.no_grad()
    def start_text_projection(self, weight: Tensor, source: str) -> None:
        """Copy CLIP's text projection [out,in]."""
        if self.text_projection is None:
            raise ValueError(
                "latent_preference.text_projection: the pooled text of SDXL and SD 3 is projected already; "
                "set it to null"
            )
        if weight.shape != self.text_projection.weight.shape:
            expected = list(self.text_projection.weight.shape)
            raise ValueError(
                f"latent_preference.text_projection: {source} has a projection of {list(weight.shape)}, but "
                f"the base's text encoder needs {expected}"
            )
        self.text_projection.weight.copy_(weight)

    def make_trainable(self, settings: LatentPreference, seed: int) -> None:
        """Make the heads trainable, and the other modules that settings.trained names."""
        if settings.trained == "all":
            self.encoder.train_fully()
        elif settings.lora is not None:
            self.encoder.add_lora(settings.lora, seed)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The denoiser's inputs for B prompts and, with VFE, for as many empty ones; and `target`, the
        normalised text features [B,D]."""
        conditioning = self.encoder.encode_prompts(prompts)
        pooled = conditioning.tensors["pooled"].float()
        projected = pooled if self.text_projection is None else self.text_projection(pooled)
        tensors = {**conditioning.tensors, "target": F.normalize(projected, dim=-1)}
        if is_guided(self.feature_guidance):
            empty = self.encoder.empty_prompt().repeat(len(prompts))
            tensors |= {EMPTY + name: value for name, value in empty.tensors.items()}
        return Conditioning(tensors)

    def image_features(self, x_t: Tensor, text: Conditioning, timesteps: Tensor) -> Tensor:
        """Pooled states [B,width] of the down blocks, then of the mid block with VFE (Sec. 3.1); of a
        transformer its last block's with VFE.

        v_mid = v_empty + guidance * (v_text - v_empty); the down blocks' are those of the prompt.
        """
        if not is_guided(self.feature_guidance):
            down, middle = self.encoder.features(x_t, timesteps, text)
            return torch.cat([*down, middle], dim=-1)
        names = [name for name in text.tensors if EMPTY + name in text.tensors]
        both = Conditioning({n: torch.cat([text.tensors[EMPTY + n], text.tensors[n]]) for n in names})
        down, middle = self.encoder.features(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        without, with_text = middle.chunk(2)
        enhanced = without + self.feature_guidance * (with_text - without)
        return torch.cat([*(state.chunk(2)[1] for state in down), enhanced], dim=-1)

    def score(self, x_t: Tensor, text: Conditioning, timesteps: Tensor) -> Tensor:
        """exp(logit_scale) * cos [B] of latents [B,C,h,w], noised to `timesteps` [B], and texts."""
        features = F.normalize(self.visual_projection(self.image_features(x_t, text, timesteps)), dim=-1)
        return self.logit_scale.exp() * (features * text.tensors["target"]).sum(-1)

    def save_pretrained(self, folder: str | Path, backbone: Backbone) -> None:
        """Write config.json and model.safetensors, an adapter merged into the weights.

        Args:
            backbone: the base, whose VAE made the latents.
        """
        self.encoder.merge_lora()  # does nothing after `LatentTask.finish`
        settings = {
            "feature_guidance": self.feature_guidance,
            "base": _base(self.encoder, backbone),
            "vae_probe": [round(float(v), 4) for v in vae_probe(backbone)],
        }
        if self.encodes_empty_prompt:
            settings["encodes_empty_prompt"] = True
        checkpoint.save(Path(folder), self.state_dict(), settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: Backbone) -> Self:
        """Load a folder written by `save_pretrained`, for latents of `backbone`."""
        folder = Path(folder)
        checkpoint.check_folder(folder, "latent reward model", "spo preference latent")
        settings = _read_config(folder / CONFIG)
        encoder = backbone.feature_model()
        _check_base(folder, settings, encoder, backbone)
        model = cls(encoder, settings["feature_guidance"], settings.get("encodes_empty_prompt") is True)
        where = str(folder / WEIGHTS)
        weights.fill(model, weights.load_state(folder / WEIGHTS, where), where)
        return model.to(backbone.device).eval()


class LatentRewardModel:
    """A trained latent reward model as a `types.RewardModel`: no gradients, nothing decoded."""

    needs_images = False

    def __init__(self, model: LatentPreferenceModel, judged_at: Literal["candidate", "step"]) -> None:
        """
        Args:
            judged_at: the timestep given with a candidate: its own, or that of the step that drew it.
        """
        self.model, self.judged_at = model.eval().requires_grad_(False), judged_at

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.model.encode_text(prompts)

    @torch.no_grad()
    def score(self, candidates: Candidates, text: Conditioning) -> Tensor:
        own = self.judged_at == "candidate"
        timesteps = candidates.timesteps if own else candidates.step_timesteps
        return self.model.score(candidates.latents, text, timesteps)


def vae_probe(backbone: Backbone) -> Tensor:
    """Means of a fixed image's latents over quarters [4C]: the same for the same latent space only."""
    height, width = backbone.image_size
    rows = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(-1, 1, width).view(1, -1).expand(height, width)
    image = torch.stack([rows, columns, (4 * math.pi * rows * columns).sin()])
    with torch.no_grad():
        latents = backbone.encode(image[None].to(backbone.device))
    return F.adaptive_avg_pool2d(latents.float(), 2).flatten().cpu()


def _read_config(path: Path) -> dict[str, Any]:
    kinds = {"feature_guidance": float, "base": dict, "vae_probe": list}
    advice = "give a folder written by `spo preference latent`"
    settings = read_json(path, "latent reward model", then=advice)
    if not all(isinstance(settings.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path}: not the config of a latent reward model; {advice}")
    return settings


def _base(encoder: FirstPart, backbone: Backbone) -> dict[str, Any]:
    """What the base of a model and that of the policy must have in common."""
    return {
        "channels of the latents": backbone.latent_shape[0],
        **encoder.facts,
        "width of the pooled text": encoder.text_width,
    }


def _check_base(folder: Path, settings: dict[str, Any], encoder: FirstPart, backbone: Backbone) -> None:
    """Refuse a model that scores latents of another base or VAE."""
    advice = "train it again by `spo preference latent`"
    for what, expected in _base(encoder, backbone).items():
        found = settings["base"].get(what)
        if found != expected:
            raise ValueError(
                f"{folder}: a latent reward model of another base: {what}: {found}, but the base model has "
                f"{expected}; {advice}"
            )
    check_vae(torch.tensor(settings["vae_probe"]), vae_probe(backbone), str(folder), advice)


def check_vae(probe: Tensor, own: Tensor, where: str, advice: str) -> None:
    """Refuse a model whose VAE gives a test image other latents than the base's, by `vae_probe`."""
    if probe.shape != own.shape or float((probe - own).norm()) > PROBE_TOLERANCE * float(own.norm()):
        raise ValueError(
            f"{where}: a latent reward model of another VAE: its latents of a test image differ from "
            f"those of the base model's VAE; {advice}, or name the VAE it was trained with in backbone.vae"
        )
