"""The world of scenes: attributes, captions, and the quality that captions never name.

A batch of N scenes is two tensors:

* attributes int64 [N,8], one column per name in `ATTRIBUTES`. Slot 0 is the upper or left shape of
  a pair, so that "a above b" and "b below a" are the same scene. Scenes of one shape have `ABSENT` in
  the columns of slot 1.
* quality [N,4] in [0,1], one column per name in `QUALITY`, independent of each other and of the
  attributes. The aesthetic quality is the mean of the four.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = ("circle", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
BACKGROUNDS = ("sand", "snow", "slate", "sky")
# five places of a single shape, then the two arrangements of a pair
LAYOUTS = ("in the middle", "at the top", "at the bottom", "at the left", "at the right", "above", "left of")
PLACES = LAYOUTS[:5]
REVERSED = {"above": "below", "left of": "right of"}

ATTRIBUTES = ("layout", "background", "shape_0", "colour_0", "size_0", "shape_1", "colour_1", "size_1")
CHOICES = (LAYOUTS, BACKGROUNDS, SHAPES, COLOURS, SIZES, SHAPES, COLOURS, SIZES)
QUALITY = ("sharp", "clean", "saturated", "lit")
ABSENT = -1


def vocabulary() -> list[str]:
    """List every word that a caption can contain, sorted."""
    texts = (*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *LAYOUTS, *REVERSED.values(), "a", "on")
    return sorted({word for text in texts for word in text.split()})


def caption(attributes: Sequence[int], reverse: bool = False) -> str:
    """Describe a scene (one row of attributes); `reverse` begins with the second shape of a pair."""
    layout, background, *slots = attributes
    first = _phrase(slots[:3])
    if layout < len(PLACES):
        return f"{first} {LAYOUTS[layout]} on {BACKGROUNDS[background]}"
    second, relation = _phrase(slots[3:]), LAYOUTS[layout]
    if reverse:
        first, second, relation = second, first, REVERSED[relation]
    return f"{first} {relation} {second} on {BACKGROUNDS[background]}"


def captions(attributes: Tensor, generator: torch.Generator) -> list[str]:
    """Describe N scenes; about half of the captions of pairs begin with the second shape."""
    reverse = torch.rand(len(attributes), generator=generator) < 0.5
    return [caption(a, bool(r)) for a, r in zip(attributes.tolist(), reverse, strict=True)]


def parse(text: str) -> Tensor:
    """Parse a caption to its attributes int64 [8]; the inverse of `caption`."""
    try:
        scene, background = text.split(" on ")
        for relation in (*LAYOUTS[len(PLACES) :], *REVERSED.values()):
            first, separator, second = scene.partition(f" {relation} a ")
            if separator:
                return _parse_pair(relation, first, f"a {second}", background)
        words = scene.split()
        place = LAYOUTS.index(" ".join(words[4:]) or PLACES[0])
        row = [place, BACKGROUNDS.index(background), *_parse_phrase(words[:4])]
        return torch.tensor([*row, ABSENT, ABSENT, ABSENT])
    except ValueError:
        raise ValueError(f"not a scene: {text!r}; try {caption([5, 0, 0, 0, 1, 3, 4, 0])!r}") from None


def _phrase(slot: Sequence[int]) -> str:
    shape, colour, size = slot
    return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"


def _parse_phrase(words: Sequence[str]) -> list[int]:
    article, size, colour, shape = words
    if article != "a":
        raise ValueError(article)
    return [SHAPES.index(shape), COLOURS.index(colour), SIZES.index(size)]


def _parse_pair(relation: str, first: str, second: str, background: str) -> Tensor:
    for forward, backward in REVERSED.items():
        if relation == backward:
            relation, first, second = forward, second, first
    slots = _parse_phrase(first.split()) + _parse_phrase(second.split())
    return torch.tensor([LAYOUTS.index(relation), BACKGROUNDS.index(background), *slots])
