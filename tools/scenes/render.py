"""Render scenes: signed distances to shapes, then colour, then the four quality factors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.scenes.world import ABSENT, COLOURS, PLACES

SIZE = 48  # side of an image, in pixels
RADIUS = (6.6, 10.4)  # small, large, in pixels
PLACE_CENTRES = (
    (0, 0),
    (0, -11),
    (0, 11),
    (-11, 0),
    (11, 0),
)  # of a single shape, from the centre, in pixels
PAIR_OFFSET = 11.5  # of each shape of a pair from the centre, in pixels
SOFT_EDGE = (7.0, 0.8)  # edge width in pixels at sharp = 0 and 1
GRAIN = 0.12  # amplitude at clean = 0
LEAST_SATURATION = 0.25  # at saturated = 0
SHADOW = 0.75  # fraction of light lost on the dark side at lit = 0

COLOUR_RGB = torch.tensor(
    [[220, 38, 38], [242, 138, 28], [238, 215, 45], [35, 165, 70], [40, 80, 220], [150, 55, 190]]
) / 255  # fmt: skip
BACKGROUND_RGB = torch.tensor([[224, 198, 150], [236, 241, 246], [84, 92, 104], [150, 200, 236]]) / 255
LUMA = torch.tensor([0.299, 0.587, 0.114])


def render(attributes: Tensor, quality: Tensor, generator: torch.Generator) -> Tensor:
    """Render N scenes.

    Args:
        attributes: int64 [N,8], see `spo.scenes.world`.
        quality: [N,4] in [0,1].
        generator: of a small jitter of place, size and rotation, the grain, and the shadow's direction.

    Returns:
        images [N,3,48,48] in [-1,1].
    """
    n = len(attributes)
    sharp, clean, saturated, lit = (quality[:, i].view(n, 1, 1, 1) for i in range(4))
    image = BACKGROUND_RGB[attributes[:, 1]].view(n, 3, 1, 1).expand(n, 3, SIZE, SIZE)
    width = SOFT_EDGE[0] + (SOFT_EDGE[1] - SOFT_EDGE[0]) * sharp.view(n, 1, 1)
    for slot in (0, 1):
        shape, colour, size = (attributes[:, 2 + 3 * slot + i] for i in range(3))
        distance = _distance(shape, _centres(attributes[:, 0], slot), size, generator)
        cover = torch.sigmoid(-4 * distance / width) * (shape != ABSENT).view(n, 1, 1)
        rgb = COLOUR_RGB[colour.clamp(min=0)].view(n, 3, 1, 1)
        image = image + cover.unsqueeze(1) * (rgb - image)
    image = _saturate(image, LEAST_SATURATION + (1 - LEAST_SATURATION) * saturated)
    image = image * _light(lit, generator)
    return (image + GRAIN * (1 - clean) * _grain(n, generator)).clamp(0, 1) * 2 - 1


def _centres(layout: Tensor, slot: int) -> Tensor:
    """The centres [N,2] of shapes as (x, y) from the centre of the image, in pixels."""
    o = -PAIR_OFFSET if slot == 0 else PAIR_OFFSET
    return torch.tensor([*PLACE_CENTRES, (0, o), (o, 0)], dtype=torch.float32)[layout]


def _distance(shape: Tensor, centres: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """The signed distance [N,48,48] to a shape in pixels, negative inside."""
    n = len(shape)
    centres = centres + torch.rand(n, 2, generator=generator) * 2 - 1
    radius = torch.tensor(RADIUS)[size.clamp(min=0)] * (0.95 + 0.1 * torch.rand(n, generator=generator))
    turn = (torch.rand(n, generator=generator) - 0.5) * 0.3
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x - centres[:, 0].view(n, 1, 1), y - centres[:, 1].view(n, 1, 1)
    cos, sin = turn.cos().view(n, 1, 1), turn.sin().view(n, 1, 1)
    x, y, r = cos * x + sin * y, cos * y - sin * x, radius.view(n, 1, 1)
    all_shapes = torch.stack([f(x, y, r) for f in _SHAPES], dim=1)
    return all_shapes[torch.arange(n), shape.clamp(min=0)]


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    side = math.sqrt(3) / 2
    y = y - 0.22 * r  # the centroid is below the centre of the bounding box: shift it there
    return torch.maximum(y - 0.6 * r, side * x.abs() - 0.5 * y - 0.6 * r)


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """The distance to a star of five points: in each fifth, to the line from an outer to an inner corner."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    rho, outer, inner = torch.hypot(x, y), 1.15 * r, 0.42 * r
    px, py = rho * angle.sin(), rho * angle.cos()
    ex, ey = inner * math.sin(fifth / 2), inner * math.cos(fifth / 2) - outer
    return (px * -ey + (py - outer) * ex) / torch.hypot(ex, ey)


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76 * r).abs() - 0.25 * r


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - r, short - 0.3 * r)


_SHAPES = (_circle, _triangle, _star, _ring, _cross)


def _saturate(image: Tensor, saturation: Tensor) -> Tensor:
    grey = (image * LUMA.view(1, 3, 1, 1)).sum(1, keepdim=True)
    return grey + saturation * (image - grey)


def _light(lit: Tensor, generator: torch.Generator) -> Tensor:
    """The light [N,1,48,48], with a shadow along a random direction."""
    angle = torch.rand(len(lit), generator=generator).view(-1, 1, 1) * 2 * math.pi
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    ramp = torch.sigmoid(2.5 * (x * angle.cos() + y * angle.sin()) + 0.5)
    return 1 - SHADOW * (1 - lit) * ramp.unsqueeze(1)


def _grain(n: int, generator: torch.Generator) -> Tensor:
    """Mottled noise [N,3,48,48] in blotches of four pixels, the VAE's factor (finer noise costs colours)."""
    side = SIZE // 4
    luma = torch.randn(n, 1, side, side, generator=generator)
    chroma = torch.randn(n, 3, side, side, generator=generator)
    return F.interpolate(luma + 0.3 * chroma, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


assert len(COLOUR_RGB) == len(COLOURS) and len(PLACE_CENTRES) == len(PLACES)
