"""The base model: VAE, text encoder and UNet, trained on scenes of every quality.

Settings that were tried and mattered: KL weight 1e-6 with three latent channels tied to the pooled
image (a larger KL weight lost hues); latents whitened channel by channel inside the VAE's own 1x1
convolutions, so that scaling_factor is 1; min-SNR-5 weights (arXiv 2303.09556).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spo.scenes import world
from tools.scenes import draws
from tools.scenes.fit import fit
from tools.scenes.render import SIZE, render
from tools.scenes.tokenizer import save as save_tokenizer

WIDTH = 96  # of the text encoder and cross-attention
LATENT_CHANNELS = 8  # four lost edges: shape accuracy .90 -> .75, correlation of "sharp" .68 -> .50
VAE_STEPS, VAE_BATCH, VAE_SCENES = 2600, 16, 16_000
COLOUR = 4.0  # extra weight of colour errors: without it red came back orange, blue purple
UNET_STEPS, UNET_BATCH = 3400, 48
TRAINING_SCENES = 40_000
CAPTION_DROP = 0.1
# the base model learns from mostly mediocre images, as the web's are: quality is uniform ** SKEW
SKEW = 2.0


def random_scenes(n: int, seed: int, skew: float = 1.0) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Attributes, quality, images as uint8 [n,3,48,48] and captions; drawn in chunks to bound memory."""
    parts: list[tuple[Any, ...]] = []
    for start in tqdm(range(0, n, 1000), desc="render", mininterval=5):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        count = min(1000, n - start)
        attributes = draws.random_attributes(count, generator)
        quality = draws.random_quality(count, generator) ** skew
        pixels = ((render(attributes, quality, generator) + 1) * 127.5).round().to(torch.uint8)
        parts.append((attributes, quality, pixels, world.captions(attributes, generator)))
    columns = [torch.cat([p[i] for p in parts]) for i in range(3)]
    return columns[0], columns[1], columns[2], [c for p in parts for c in p[3]]


def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def train_vae(pixels: Tensor, work: Path, seed: int) -> Any:
    """The VAE (f=4), whitened on the training images."""
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    vae.to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pixels), (VAE_BATCH,), generator=generator)
        images = to_float(pixels[index]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        tie = F.mse_loss(posterior.mean[:, :3], F.avg_pool2d(images, 4))
        error = decoded - images
        colour = error - error.mean(1, keepdim=True)
        reconstruction = error.square().mean() + 0.1 * error.abs().mean() + COLOUR * colour.square().mean()
        return reconstruction + 0.5 * tie + 1e-6 * posterior.kl().mean()

    fit("vae", vae, loss, steps=VAE_STEPS, lr=2e-3, work=work, seed=seed, ema=0.995)
    _whiten(vae, torch.cat([encode(vae, pixels[i : i + 100]) for i in range(0, 2000, 100)]))
    return vae.requires_grad_(False)


@torch.no_grad()
def _whiten(vae: Any, latents: Tensor) -> None:
    """Fold zero mean and unit variance of each latent channel into the VAE's 1x1 convolutions."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log-variances
    post.bias += (post.weight.flatten(1) * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    images = to_float(pixels).contiguous(memory_format=torch.channels_last)
    return vae.encode(images).latent_dist.mean


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, vocabulary_size: int, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(vocabulary_size, tokenizer))
        unet: Any = UNet2DConditionModel(
            sample_size=SIZE // 4,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(48, WIDTH),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.unet = unet.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, timesteps, self.text_encoder(ids).last_hidden_state).sample


def text_config(vocabulary_size: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_denoiser(
    vae: Any, pixels: Tensor, captions: list[str], tokenizer: CLIPTokenizer, work: Path, seed: int
) -> Denoiser:
    """The text encoder and UNet."""
    torch.manual_seed(seed)
    model = Denoiser(len(tokenizer), tokenizer)
    scheduler = ddim_scheduler()
    ids, empty = tokens(tokenizer, captions), tokens(tokenizer, [""])
    batches = tqdm(range(0, len(pixels), 100), desc="encode", mininterval=5)
    latents = torch.cat([encode(vae, pixels[i : i + 100]) for i in batches])
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        drop = torch.rand(UNET_BATCH, 1, generator=generator) < CAPTION_DROP
        x_t = scheduler.add_noise(latents[index], noise, timesteps)
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        error = (model(x_t, timesteps, torch.where(drop, empty, ids[index])) - noise).square().mean((1, 2, 3))
        return (error * (snr[timesteps].clamp(max=5) / snr[timesteps])).mean()

    settings: dict[str, Any] = {"steps": UNET_STEPS, "lr": 1.5e-3, "ema": 0.997}
    fit("unet", model, loss, work=work, seed=seed + 1, **settings)
    return model.requires_grad_(False)


def ddim_scheduler() -> Any:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(vae: Any, model: Denoiser, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """One diffusers folder, weights in half precision (as shipped, so all users have the same)."""
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def build(output: Path, work: Path, seed: int) -> None:
    """Train and save `output`/base."""
    tokenizer = save_tokenizer(world.vocabulary(), work / "tokenizer")
    vae = train_vae(random_scenes(VAE_SCENES, seed + 1)[2], work, seed)
    _, _, pixels, captions = random_scenes(TRAINING_SCENES, seed, SKEW)
    denoiser = train_denoiser(vae, pixels, captions, tokenizer, work, seed)
    save_pipeline(vae, denoiser, tokenizer, output / "base")
