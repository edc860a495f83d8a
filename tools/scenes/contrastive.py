"""CLIP's own training, on images whose captions name quality as those of the web do.

A real CLIP has seen so many captions that its image features contain quality: LAION's
aesthetic predictor is a linear head on them. At this size the captions' words alone teach little of it,
so a regression head stands in for that scale: for the last updates, a linear head on the image features
must also predict the four factors. The head is then discarded. Tried with one seed, linear probes of the four
factors on renders: no words .21/.27/.75/.74, words alone .16/.73/.83/.93, words and head .63/.93/.88/.96.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from spo.scenes import world
from spo.scenes.oracle import Perception
from spo.scenes.world import ABSENT, ATTRIBUTES, CHOICES, QUALITY
from tools.scenes import words
from tools.scenes.base_model import WIDTH, random_scenes, to_float, tokens
from tools.scenes.clips import Features
from tools.scenes.fit import fit
from tools.scenes.perception import through_vae

BATCH = 96
HEAD_WEIGHT = 20.0
SHAPE_COLUMNS = (ATTRIBUTES.index("shape_0"), ATTRIBUTES.index("shape_1"))


@dataclass(frozen=True)
class Texts:
    """What captions of a part of the training name, and how many wrong captions there are for each image."""

    least: int  # factors named
    other_attributes: int  # wrong captions with one attribute changed
    other_grades: int  # wrong captions with one grade changed


WORDS_ALONE, BESIDE_HEAD = Texts(1, 1, 2), Texts(0, 3, 0)  # the head sees to the grades
RATES = (1e-3, 7e-4)


@dataclass(frozen=True)
class Size:
    """The size of a CLIP's training."""

    scenes: int = 30_000
    steps: int = 1600  # contrastive alone
    steps_with_head: int = 1100


SMALLER = Size(12_000, 300, 400)  # of the scorers that only evaluate


@dataclass(frozen=True)
class WebImages:
    """N images of the web: half of them rendered, half of them also through the base model's VAE."""

    attributes: Tensor  # int64 [N,8]
    pixels: Tensor  # uint8 [N,3,48,48]
    seen: Tensor  # [N,4] in [0,1], the four factors as a perception network predicts them
    grades: Tensor  # int64 [N,4], 0 to 3

    @classmethod
    def collect(cls, n: int, vae: Any, eyes: Perception, seed: int) -> WebImages:
        attributes, _, pixels, _ = random_scenes(n, seed)
        pixels = torch.cat([through_vae(vae, pixels[: n // 2]), pixels[n // 2 :]])
        seen = torch.cat([eyes.perceive(to_float(p))[0] for p in pixels.split(1000)])
        return cls(attributes, pixels, seen, words.quartiles(seen))


class WithHead(nn.Module):
    """A CLIP and a linear head from its image features to the four factors."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, nn.Linear(WIDTH, len(QUALITY))


def train(
    name: str,
    model: nn.Module,
    features: Features,
    tokenizer: CLIPTokenizer,
    images: WebImages,
    size: Size,
    work: Path,
    seed: int,
) -> None:
    """Train a CLIP in place: contrastive alone, then with a regression head that is discarded."""

    def contrastive(generator: torch.Generator) -> Tensor:
        return _loss(features, tokenizer, images, WORDS_ALONE, generator)[0]

    fit(name, model, contrastive, steps=size.steps, lr=RATES[0], work=work, seed=seed, ema=0.99)
    torch.manual_seed(seed)
    both = WithHead(model)

    def with_head(generator: torch.Generator) -> Tensor:
        value, image, index = _loss(features, tokenizer, images, BESIDE_HEAD, generator)
        return value + HEAD_WEIGHT * F.mse_loss(both.head(image), images.seen[index])

    settings: dict[str, Any] = {"steps": size.steps_with_head, "lr": RATES[1], "ema": 0.99}
    fit(f"{name} with head", both, with_head, work=work, seed=seed + 1, **settings)


def _loss(
    features: Features,
    tokenizer: CLIPTokenizer,
    images: WebImages,
    kinds: Texts,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's loss with hard negatives (as NegCLIP, arXiv 2210.01936), the image features [B,D] and which
    images [B] they are of. With random batches alone colours and places suffice, and shapes stay unseen
    (74 % right against wrong)."""
    index = torch.randint(len(images.pixels), (BATCH,), generator=generator)
    texts = right_and_wrong(images.attributes[index], images.grades[index], kinds, generator)
    image, text, scale = features(to_float(images.pixels[index]), tokens(tokenizer, texts))
    right, wrong = text[:BATCH], text[BATCH:].unflatten(0, (-1, BATCH))
    logits, target = scale * image @ right.T, torch.arange(BATCH)
    hard = scale * torch.einsum("bd,kbd->bk", image, wrong)
    of_images = F.cross_entropy(torch.cat([logits, hard], dim=1), target)
    return (of_images + F.cross_entropy(logits.T, target)) / 2, image, index


def right_and_wrong(
    attributes: Tensor, grades: Tensor, kinds: Texts, generator: torch.Generator
) -> list[str]:
    """Captions of N images, then as many of each wrong kind: with another attribute, with another grade."""
    named = words.choose(len(attributes), kinds.least, generator)
    captions = world.captions(attributes, generator)
    texts = words.say(captions, grades, named)
    for _ in range(kinds.other_attributes):
        other = world.captions(another_attribute(attributes, generator), generator)
        texts += words.say(other, grades, named)
    for _ in range(kinds.other_grades):
        texts += words.say(captions, words.another_grade(grades, named, generator), named)
    return texts


def another_attribute(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes with one attribute changed: half of the time a shape, else any but the layout."""
    n, rows = len(attributes), torch.arange(len(attributes))
    column = torch.randint(1, len(CHOICES), (n,), generator=generator)
    shape = torch.where(torch.rand(n, generator=generator) < 0.5, SHAPE_COLUMNS[0], SHAPE_COLUMNS[1])
    column = torch.where(torch.rand(n, generator=generator) < 0.5, shape, column)
    column = torch.where(attributes[rows, column] == ABSENT, SHAPE_COLUMNS[0], column)
    sizes = torch.tensor([len(c) for c in CHOICES])[column]
    step = 1 + (torch.rand(n, generator=generator) * (sizes - 1)).long()
    other = attributes.clone()
    other[rows, column] = (attributes[rows, column] + step) % sizes
    return other
