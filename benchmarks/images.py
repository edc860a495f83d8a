"""Generation against diffusers' pipeline, and scoring in batches against scoring one by one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from benchmarks.measure import Case
from benchmarks.models import SEED, Models
from spo import config
from spo.data.images import to_tensor
from spo.diffusion.noise import generator
from spo.rewards import load_scorer
from spo.types import Scorer
from spo.validation.generation import draw

SCORERS = ("pickscore", "hps", "aesthetic")


def generation(models: Models, count: int, tolerance: float = 1.0) -> Iterator[Case]:
    """Images of prompts by diffusers' pipeline with the same noise.

    Args:
        tolerance: of the pixels, in steps of 1/255.
    """
    backbone, pipeline = models.backbone, copy.deepcopy(models.backbone.pipeline)
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.contiguous_format)
    pipeline.scheduler = DDIMScheduler.from_config(dict(backbone.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    prompts = models.some_prompts(count)
    settings = models.params.generate.model_copy(update={"batch_size": count, "eta": 1.0})
    params = models.params.model_copy(update={"generate": settings})
    variant = settings.base

    def pixels(images: Iterator[Image.Image]) -> Tensor:
        return torch.stack([to_tensor(image) for image in images]) * 127.5

    def ours() -> Tensor:
        return pixels(draw(backbone, params, variant, prompts, list(range(count))))

    def theirs() -> Tensor:
        return pixels(
            iter(
                pipeline(
                    prompts,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=variant.guidance,
                    eta=1.0,
                    generator=[generator(0, seed) for seed in range(count)],
                ).images
            )
        )

    yield Case("generation", "diffusers' pipeline", "image", count, ours, theirs, tolerance)


def scorers(params: config.Params, batch_size: int) -> list[tuple[str, int, Scorer]]:
    """Name, image side and scorer of the experiment's own scorers."""
    found = []
    for name in SCORERS:
        settings: Any = getattr(params.score, name)
        found.append((name, settings.image_size, load_scorer(name, settings, "cpu", batch_size)))
    return found


def vit_b_16(models: Models, batch_size: int) -> tuple[str, int, Scorer]:
    """PickScore with random weights in CLIP ViT-B/16's shape."""
    torch.manual_seed(SEED)
    length = models.tokenizer.model_max_length
    ids = {name: getattr(models.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(vocab_size=49408, max_position_embeddings=length, **ids)
    vision = CLIPVisionConfig(patch_size=16, image_size=224)
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        models.tokenizer.save_pretrained(folder)
        settings = config.PickScoreConfig(model=str(Path(folder)), image_size=224)
        return "pickscore, ViT-B/16", 224, load_scorer("pickscore", settings, "cpu", batch_size)


def scoring(found: Sequence[tuple[str, int, Scorer]], models: Models, count: int) -> Iterator[Case]:
    """Scores of `count` images at once, against one call an image."""
    prompts = models.some_prompts(count)

    def at_once(scorer: Scorer, images: list[Image.Image]) -> Tensor:
        return torch.tensor(scorer.score(images, prompts))

    def one_by_one(scorer: Scorer, images: list[Image.Image]) -> Tensor:
        return torch.tensor([scorer.score([i], [p])[0] for i, p in zip(images, prompts, strict=True)])

    for name, side, scorer in found:
        drawn = np.random.default_rng(SEED).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        images = [Image.fromarray(image) for image in drawn]
        ours, other = partial(at_once, scorer, images), partial(one_by_one, scorer, images)
        yield Case(f"scoring: {name}", "one by one", "image", count, ours, other, 1e-4)
