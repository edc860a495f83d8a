"""The CLIPs trained on labels: PickScore on the shipped pairs, as the real one on Pick-a-Pic, and HPS and
aesthetic on images, captions and labels of their own, none of which is in the preference pairs.

Each starts from a CLIP of its own that learned from images and captions of the web.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from spo.scenes import world
from spo.scenes.oracle import Perception
from spo.scenes.world import ABSENT, CHOICES
from tools import scenes as world_build
from tools.scenes import clips, contrastive, draws, preferences, probes, shards, tokenizer, words
from tools.scenes.annotators import Annotators
from tools.scenes.base_model import random_scenes, to_float
from tools.scenes.clips import LabelledPairs
from tools.scenes.contrastive import Size, WebImages
from tools.scenes.preferences import Pairs
from tools.scenes.render import render

HELD_OUT = 0.2  # of the pairs for HPS and the aesthetic score
PROBED = 2500  # held-out pairs whose images are probed

Build = world_build.Build


def vocabulary(build: Build) -> CLIPTokenizer:
    """The tokenizer of CLIPs: it has the words of quality, which the base model's lacks."""
    texts = [*world.vocabulary(), *words.all_words()]
    return tokenizer.save(texts, build.work / "clip tokenizer", tokenizer.CLIP_MAX_LENGTH)


def learn_from_the_web(
    build: Build, name: str, model: nn.Module, features: clips.Features, size: Size, seed: int
) -> None:
    images = WebImages.collect(size.scenes, build.vae(), Perception.load(build.work / "web"), seed)
    contrastive.train(name, model, features, vocabulary(build), images, size, build.work, seed)


def start_clip(build: Build, name: str, own: int, size: Size) -> None:
    """Train a CLIP on the web's images and captions, into the work folder."""
    seed, texts = build.seed + own, vocabulary(build)
    model = clips.fresh_clip(texts, seed)
    learn_from_the_web(build, name, model, clips.clip_features(model), size, seed)
    clips.save_pickscore(model, texts, build.work / name)


def pickscore(build: Build) -> dict[str, Any]:
    """Fine-tune the start CLIP on the training part of the shipped pairs; measure it before and after."""
    train, held_out = shards.read(build.output / "pairs")
    texts, model = vocabulary(build), CLIPModel.from_pretrained(build.work / "clip")
    features, seed = clips.clip_features(model), build.seed + world_build.SEED_CLIP
    before = _seen(build, features, texts, held_out)
    clips.prefer("pickscore", model, features, train, texts, build.work, seed + 1)
    clips.save_pickscore(model, texts, build.output / "scorers" / "pickscore")
    return {
        "pairs_of_training": len(train.captions),
        "pairs_held_out": len(held_out.captions),
        "start_clip": before,
        "training": probes.agreement(features, train, texts),
        **_seen(build, features, texts, held_out),
    }


def _seen(
    build: Build, features: clips.Features, texts: CLIPTokenizer, held_out: LabelledPairs
) -> dict[str, Any]:
    """Measure a CLIP: agreement with held-out labels, right against wrong captions, linear probes (R2)."""
    oracle = Perception.load(build.output / "oracle")
    drawn = torch.cat([held_out.pixels_0[:PROBED], held_out.pixels_1[:PROBED]])
    seed = build.seed + world_build.SEED_CHECK
    return {
        "held_out": probes.agreement(features, held_out, texts),
        "caption_accuracy": probes.caption_accuracy(features, texts, seed + 1),
        "linear_probe_r2": probes.probes(features, texts, oracle, drawn, seed + 2),
    }


def hps(build: Build, compared: Pairs) -> dict[str, Any]:
    """Train and save HPS; its agreement with its own annotators, and with those of the shipped pairs."""
    seed, texts = build.seed + world_build.SEED_HPS, vocabulary(build)
    train, own_held_out = _split(compared)
    rendered = _rendered_pairs(world_build.N_RATED_RENDERS, build.seed + world_build.SEED_SCORER_PAIRS + 2)
    labelled = _join(train, rendered)
    torch.manual_seed(seed)
    model, settings, features = clips.new_open_clip(texts)
    learn_from_the_web(build, "hps clip", model, features, contrastive.SMALLER, seed)
    clips.prefer("hps", model, features, labelled, texts, build.work, seed + 1)
    clips.save_hps(model, settings, texts, build.output / "scorers" / "hps")
    _, held_out = shards.read(build.output / "pairs")
    return {
        "annotated_pairs": len(labelled.captions),
        "statistics_of_generated_pairs": preferences.statistics(compared),
        "own_held_out": probes.agreement(features, own_held_out, texts),
        **_seen(build, features, texts, held_out),
    }


def _split(pairs: Pairs) -> tuple[LabelledPairs, LabelledPairs]:
    """Generated pairs, the last part of them held out."""
    cut = int(len(pairs.captions) * (1 - HELD_OUT))
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        pixels, labels = pairs.pixels[part], pairs.label_0[part]
        parts.append(LabelledPairs(pixels[:, 0], pixels[:, 1], pairs.captions[part], labels))
    return parts[0], parts[1]


def _join(a: LabelledPairs, b: LabelledPairs) -> LabelledPairs:
    return LabelledPairs(
        torch.cat([a.pixels_0, b.pixels_0]),
        torch.cat([a.pixels_1, b.pixels_1]),
        a.captions + b.captions,
        torch.cat([a.label_0, b.label_0]),
    )


def _rendered_pairs(n: int, seed: int) -> LabelledPairs:
    """Rendered images of a caption; half of the time one image has one or two attributes wrong."""
    generator = torch.Generator().manual_seed(seed)
    asked = draws.random_attributes(n, generator)
    captions = world.captions(asked, generator)
    annotators = Annotators.draw(preferences.ANNOTATORS, generator)
    who = torch.randint(preferences.ANNOTATORS, (n,), generator=generator)
    pixels, values = [], []
    for side in (0, 1):
        shown = _altered(asked, generator) if side else asked
        quality = draws.random_quality(n, generator)
        images = [render(shown[i : i + 1000], quality[i : i + 1000], generator) for i in range(0, n, 1000)]
        pixels.append(((torch.cat(images) + 1) * 127.5).round().to(torch.uint8))
        named = asked != ABSENT
        layout = ((shown == asked) & named).sum(1) / named.sum(1)
        values.append(annotators.value(who, quality, layout))
    swap = torch.rand(n, generator=generator) < 0.5
    label = annotators.compare(who, values[0], values[1], generator)
    view = swap.view(n, 1, 1, 1)
    first, second = torch.where(view, pixels[1], pixels[0]), torch.where(view, pixels[0], pixels[1])
    return LabelledPairs(first, second, captions, torch.where(swap, 1 - label, label))


def _altered(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the scenes with one or two attributes (never the layout's kind) drawn anew."""
    n = len(attributes)
    out = attributes.clone()
    for _ in range(2):
        column = torch.randint(1, len(CHOICES), (n,), generator=generator)
        chosen = (torch.rand(n, generator=generator) < 0.35).nonzero()[:, 0]
        sizes = torch.tensor([len(c) for c in CHOICES])[column]
        fresh = (torch.rand(n, generator=generator) * sizes).long()
        rows = chosen[out[chosen, column[chosen]] != ABSENT]
        out[rows, column[rows]] = fresh[rows]
    return out


def aesthetic(build: Build, compared: Pairs) -> dict[str, Any]:
    """Train and save the aesthetic predictor; its correlations with the true quality."""
    seed, texts = build.seed + world_build.SEED_AESTHETIC, vocabulary(build)
    start_clip(build, "aesthetic clip", world_build.SEED_AESTHETIC, contrastive.SMALLER)
    clip = CLIPModel.from_pretrained(build.work / "aesthetic clip")
    generator = torch.Generator().manual_seed(seed + 2)
    _, quality, pixels, _ = random_scenes(world_build.N_RATED_RENDERS + 1000, seed + 2)
    all_pixels = torch.cat([compared.pixels.flatten(0, 1), pixels[:-1000]])
    all_quality = torch.cat([compared.quality.flatten(0, 1), quality[:-1000]])
    annotators = Annotators.draw(preferences.ANNOTATORS, generator)
    who = torch.randint(preferences.ANNOTATORS, (len(all_pixels),), generator=generator)
    ratings = annotators.rate(who, all_quality, generator)
    torch.manual_seed(seed)
    model = clips.RatedClip(clip)
    clips.train_aesthetic(model, all_pixels, ratings, build.work, seed)
    clips.save_aesthetic(model, texts, build.output / "scorers" / "aesthetic")
    _, held_out = shards.read(build.output / "pairs")
    drawn = torch.cat([held_out.pixels_0, held_out.pixels_1])
    seen, _ = Perception.load(build.output / "oracle").perceive(to_float(drawn))
    return {
        "rated_pictures": len(all_pixels),
        "correlation_renders": _correlation(model, pixels[-1000:], quality[-1000:]),
        "correlation_drawn": _correlation(model, drawn, seen),
    }


@torch.no_grad()
def _correlation(model: clips.RatedClip, pixels: Tensor, quality: Tensor) -> float:
    """Correlation of the score with the mean [N] of the four factors [N,4]."""
    scores = torch.cat([model(to_float(part)) for part in pixels.split(256)])
    return round(torch.corrcoef(torch.stack([scores, quality.mean(1)]))[0, 1].item(), 4)
