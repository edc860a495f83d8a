"""The image shows what the attributes say, and each quality factor changes what it should."""

import torch

from spo.scenes import world
from tools.scenes import draws
from tools.scenes.render import BACKGROUND_RGB, COLOUR_RGB, render


def draw(text: str, sharp: float = 1, clean: float = 1, saturated: float = 1, lit: float = 1) -> torch.Tensor:
    """One image [3,48,48] in [0,1], always with the same jitter."""
    quality = torch.tensor([[sharp, clean, saturated, lit]])
    return (render(world.parse(text)[None], quality, torch.Generator().manual_seed(0))[0] + 1) / 2


CIRCLE = "a large red circle at the left on sand"


def test_perfect_quality_shows_the_named_colours_at_the_named_place() -> None:
    image = draw(CIRCLE)
    assert torch.allclose(image[:, 24, 13], COLOUR_RGB[0], atol=0.02)
    assert torch.allclose(image[:, 24, 40], BACKGROUND_RGB[0], atol=0.02)


def test_above_puts_the_first_shape_on_top() -> None:
    image = draw("a large blue triangle above a small red circle on snow")
    assert torch.allclose(image[:, 12, 24], COLOUR_RGB[4], atol=0.02)
    assert torch.allclose(image[:, 35, 24], COLOUR_RGB[0], atol=0.02)


def test_blur_softens_the_steepest_edge() -> None:
    def steepest(image: torch.Tensor) -> float:
        return (image[:, :, 1:] - image[:, :, :-1]).abs().max().item()

    assert steepest(draw(CIRCLE, sharp=0)) < 0.5 * steepest(draw(CIRCLE))


def test_grain_is_noise_on_the_flat_background() -> None:
    def spread(image: torch.Tensor) -> float:
        return image[:, :, 36:].std(dim=(1, 2)).mean().item()

    assert spread(draw(CIRCLE)) < 0.01 < 0.05 < spread(draw(CIRCLE, clean=0))


def test_less_saturation_is_nearer_to_grey_at_the_same_brightness() -> None:
    full, pale = draw(CIRCLE)[:, 24, 13], draw(CIRCLE, saturated=0)[:, 24, 13]
    assert (pale.max() - pale.min()) / (full.max() - full.min()) < 0.3
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert abs((luma * (full - pale)).sum()) < 0.01


def test_bad_light_leaves_a_dark_side() -> None:
    def darkest(image: torch.Tensor) -> float:
        return image[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0).min().item()

    assert darkest(draw(CIRCLE, lit=0)) < 0.6 * darkest(draw(CIRCLE))


def test_same_generator_same_image_and_range() -> None:
    attributes = draws.random_attributes(8, torch.Generator().manual_seed(5))
    quality = draws.random_quality(8, torch.Generator().manual_seed(6))
    first, second = (render(attributes, quality, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (8, 3, 48, 48) and first.min() >= -1 and first.max() <= 1
