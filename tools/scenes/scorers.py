"""PickScore, HPS and aesthetic for the default world: the real formats, taught by people, pictures
and captions that the preference pairs never meet."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from spo.scenes import world
from spo.scenes.annotators import Annotators
from spo.scenes.oracle import Perception
from spo.scenes.render import render
from spo.scenes.world import ABSENT, CHOICES
from tools import scenes as world_build
from tools.scenes import clips, preferences, tokenizer
from tools.scenes.base_model import random_scenes, to_float
from tools.scenes.clips import Judgements
from tools.scenes.preferences import Pairs

HELD_OUT = 0.15


def build(output: Path, work: Path, seed: int) -> dict[str, object]:
    """Train and save the three scorers under `output`/scorers.

    Returns:
        how often each agrees with held-out clear labels, and the aesthetic head's correlation.
    """
    own = seed + world_build.SEED_SCORER_PAIRS
    eyes, words = Perception.load(work / "eyes"), tokenizer.load(work / "tokenizer")
    sizes = (world_build.N_SCORER_PAIRS, world_build.N_SCORER_CAPTIONS)
    models = (output / "base", work / "early.safetensors", eyes)
    drawn = preferences.compare(*models, *sizes, work / "scorer pictures", own)
    rendered = _rendered_pairs(world_build.N_RATED_RENDERS, own + 1)
    train, held_out = _split(drawn)
    judged = _join(train, rendered)

    clip = clips.fresh_clip(words, seed + world_build.SEED_SCORER_CLIP)
    clip_seed = seed + world_build.SEED_SCORER_CLIP
    clips.contrastive("scorer clip", clip, clips.clip_features(clip), words, work, clip_seed)
    pickscore = copy.deepcopy(clip)
    clips.prefer("pickscore", pickscore, clips.clip_features(pickscore), judged, words, work, clip_seed + 1)
    clips.save_pickscore(pickscore, words, output / "scorers" / "pickscore")

    torch.manual_seed(seed + world_build.SEED_HPS)
    hps, settings, features = clips.new_open_clip(words)
    clips.contrastive("hps clip", hps, features, words, work, seed + world_build.SEED_HPS)
    clips.prefer("hps", hps, features, judged, words, work, seed + world_build.SEED_HPS + 1)
    clips.save_hps(hps, settings, words, output / "scorers" / "hps")

    correlation = _aesthetic(clip, drawn, words, output, work, clip_seed + 2)
    return {
        "annotated_pairs": len(judged.captions),
        "statistics_of_generated_pairs": preferences.statistics(drawn),
        "pickscore_agreement": round(clips.agreement(clips.clip_features(pickscore), held_out, words), 4),
        "hps_agreement": round(clips.agreement(features, held_out, words), 4),
        "aesthetic_correlation_with_quality_of_rendered_pictures": round(correlation, 4),
    }


def _split(pairs: Pairs) -> tuple[Judgements, Judgements]:
    """Annotated generated pictures, the last part held out."""
    cut = int(len(pairs.captions) * (1 - HELD_OUT))
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        pixels, labels = pairs.pixels[part], pairs.label_0[part]
        parts.append(Judgements(pixels[:, 0], pixels[:, 1], pairs.captions[part], labels))
    return parts[0], parts[1]


def _join(a: Judgements, b: Judgements) -> Judgements:
    return Judgements(
        torch.cat([a.pixels_0, b.pixels_0]),
        torch.cat([a.pixels_1, b.pixels_1]),
        a.captions + b.captions,
        torch.cat([a.label_0, b.label_0]),
    )


def _rendered_pairs(n: int, seed: int) -> Judgements:
    """Rendered pictures of a caption; half of the time one picture has one or two attributes wrong."""
    generator = torch.Generator().manual_seed(seed)
    asked = world.random_attributes(n, generator)
    captions = world.captions(asked, generator)
    people = Annotators.draw(preferences.ANNOTATORS, generator)
    who = torch.randint(preferences.ANNOTATORS, (n,), generator=generator)
    pixels, values = [], []
    for side in (0, 1):
        shown = _altered(asked, generator) if side else asked
        quality = world.random_quality(n, generator)
        images = [render(shown[i : i + 1000], quality[i : i + 1000], generator) for i in range(0, n, 1000)]
        pixels.append(((torch.cat(images) + 1) * 127.5).round().to(torch.uint8))
        named = asked != ABSENT
        layout = ((shown == asked) & named).sum(1) / named.sum(1)
        values.append(people.value(who, quality, layout))
    swap = torch.rand(n, generator=generator) < 0.5
    label = people.compare(who, values[0], values[1], generator)
    view = swap.view(n, 1, 1, 1)
    first, second = torch.where(view, pixels[1], pixels[0]), torch.where(view, pixels[0], pixels[1])
    return Judgements(first, second, captions, torch.where(swap, 1 - label, label))


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


def _aesthetic(
    clip: clips.CLIPModel, drawn: Pairs, words: clips.CLIPTokenizer, output: Path, work: Path, seed: int
) -> float:
    """The rated CLIP, on generated and rendered pictures; its correlation on new rendered ones."""
    generator = torch.Generator().manual_seed(seed)
    _, quality, pixels, _ = random_scenes(world_build.N_RATED_RENDERS + 500, seed)
    all_pixels = torch.cat([drawn.pixels.flatten(0, 1), pixels[:-500]])
    all_quality = torch.cat([drawn.quality.flatten(0, 1), quality[:-500]])
    people = Annotators.draw(preferences.ANNOTATORS, generator)
    who = torch.randint(preferences.ANNOTATORS, (len(all_pixels),), generator=generator)
    ratings = people.rate(who, all_quality, generator)
    torch.manual_seed(seed)
    model = clips.RatedClip(copy.deepcopy(clip))
    clips.train_aesthetic(model, all_pixels, ratings, work, seed)
    clips.save_aesthetic(model, words, output / "scorers" / "aesthetic")
    with torch.no_grad():
        told = model(to_float(pixels[-500:]))
    return torch.corrcoef(torch.stack([told, quality[-500:].mean(1)]))[0, 1].item()
