"""The second base model: a tiny Stable Diffusion 3, trained on the first base's scenes by flow matching.

It shares the first base's VAE and tokenizer and has no T5: its text is the states of two CLIPs alone, so
`backbone.max_sequence_length` is 0. SD3 reads the penultimate states: each CLIP has one layer more than the
first base's, from which it starts. Both are trained with the transformer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spo.runtime.files import read_json, write_json
from tools.scenes.base_model import (
    CAPTION_DROP,
    LATENT_CHANNELS,
    SKEW,
    TRAINING_SCENES,
    WIDTH,
    encode,
    random_scenes,
    tokens,
)
from tools.scenes.fit import fit
from tools.scenes.render import SIZE

# the first steps of a longer cosine: averaged weights need no decay, and with a cosine of 1,600 steps layouts
# were learned too late (alignment .71 in place of .90)
STEPS, COSINE_STEPS, BATCH = 1600, 6500, 48
HEADS, HEAD_WIDTH, LAYERS = 6, 24, 6  # 4.5 million parameters: 12 MB in half precision with the CLIPs
TIME_MEAN = 0.2  # of the logit of the noise level: a little towards noise, where the layout is decided
APART = 0.02  # relative noise that tells the second CLIP's first weights from the first CLIP's


class FlowModel(nn.Module):
    """Two text encoders and the transformer, trained together."""

    def __init__(self, start: CLIPTextModel) -> None:
        super().__init__()
        self.clips = nn.ModuleList([_one_layer_more(start) for _ in range(2)])
        with torch.no_grad():
            for weight in self.clips[1].parameters():
                weight.add_(torch.randn_like(weight) * APART * weight.std())
        self.transformer: Any = SD3Transformer2DModel(
            sample_size=SIZE // 4,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_WIDTH,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=HEADS * HEAD_WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=SIZE // 4,
            qk_norm="rms_norm",
        )

    def forward(self, x_t: Tensor, sigmas: Tensor, ids: Tensor) -> Tensor:
        outputs = [clip(ids, output_hidden_states=True) for clip in self.clips]
        return self.transformer(
            x_t,
            timestep=1000 * sigmas,
            encoder_hidden_states=torch.cat([o.hidden_states[-2] for o in outputs], dim=-1),
            pooled_projections=torch.cat([o.text_embeds for o in outputs], dim=-1),
        ).sample


def _one_layer_more(start: CLIPTextModel) -> CLIPTextModelWithProjection:
    settings = {**start.config.to_dict(), "num_hidden_layers": start.config.num_hidden_layers + 1}
    settings.pop("dtype")
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in start.state_dict().items()}
    found = clip.load_state_dict(weights, strict=False)
    if found.unexpected_keys:
        raise ValueError(f"the first base's text encoder has other tensors: {found.unexpected_keys}")
    return clip


def training_latents(
    vae: Any, tokenizer: CLIPTokenizer, scenes: int, seed: int, file: Path
) -> tuple[Tensor, Tensor]:
    """Latents [N,8,12,12] and token ids [N,16] of the first base's training scenes, kept in `file`."""
    if not file.exists():
        _, _, pixels, captions = random_scenes(scenes, seed, SKEW)
        latents = torch.cat([encode(vae, chunk) for chunk in pixels.split(100)])
        torch.save({"latents": latents, "ids": tokens(tokenizer, captions)}, file)
    found = torch.load(file, weights_only=True)
    return found["latents"], found["ids"]


def train(
    start: CLIPTextModel, latents: Tensor, ids: Tensor, empty: Tensor, steps: int, work: Path, seed: int
) -> FlowModel:
    """Flow matching with logit-normal noise levels (arXiv 2403.03206); `empty` [1,16]: the tokens of ""."""
    torch.manual_seed(seed)
    model = FlowModel(start)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        sigmas = torch.sigmoid(torch.randn(BATCH, generator=generator) + TIME_MEAN)
        x_0, s = latents[index], sigmas.view(-1, 1, 1, 1)
        noise = torch.randn(x_0.shape, generator=generator)
        drop = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROP
        velocity = model((1 - s) * x_0 + s * noise, sigmas, torch.where(drop, empty, ids[index]))
        return (velocity - (noise - x_0)).square().mean()

    settings: dict[str, Any] = {"steps": COSINE_STEPS, "until": steps, "lr": 1.2e-3, "ema": 0.997}
    fit("flow", model, loss, work=work, seed=seed + 1, **settings)
    return model.requires_grad_(False)


def save_pipeline(base: Path, model: FlowModel, folder: Path) -> None:
    """One diffusers folder in half precision; tokenizers and the VAE's weights are the first base's files."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=model.clips[0],
        tokenizer=tokenizer,
        text_encoder_2=model.clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(base / "tokenizer", folder / name, dirs_exist_ok=True)
    shutil.copyfile(
        base / "vae/diffusion_pytorch_model.safetensors", folder / "vae/diffusion_pytorch_model.safetensors"
    )
    settings = read_json(base / "vae/config.json", "config")
    write_json(folder / "vae/config.json", {**settings, "shift_factor": 0.0})  # which SD3 adds


def build(output: Path, work: Path, seed: int, steps: int = STEPS, scenes: int = TRAINING_SCENES) -> None:
    """Train and save `output`/base_flow; `seed` is the first base's, for the same scenes."""
    base = output / "base"
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    latents, ids = training_latents(vae, tokenizer, scenes, seed, work / "latents.pt")
    start = CLIPTextModel.from_pretrained(base / "text_encoder").float()
    model = train(start, latents, ids, tokens(tokenizer, [""]), steps, work, seed)
    save_pipeline(base, model, output / "base_flow")
