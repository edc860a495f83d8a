import math

import pytest
import torch

from spo.preference.degradations import BLUR, COLOUR, LIGHT, NOISE, Draws, degrade


def draws(n: int, side: int = 12, angle: float = 0.0, **strengths: float) -> Draws:
    names = ("blur", "noise", "colour", "light")
    strength = torch.tensor([[strengths.get(name, 0.0) for name in names]] * n)
    noise = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(0))
    return Draws(strength, noise, torch.full((n,), angle))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_strength_0_leaves_a_picture_as_it_is(pictures) -> None:
    assert torch.allclose(degrade(pictures, draws(3)), pictures, atol=1e-6)


def test_blur_is_a_gaussian_of_the_given_width() -> None:
    """A point becomes a Gaussian: its second moment along x is the variance."""
    point = torch.full((1, 3, 48, 48), -1.0)
    point[..., 24, 24] = 1.0
    spread = (degrade(point, draws(1, blur=0.5))[0, 0] + 1) / 2
    assert spread.sum() == pytest.approx(1, abs=1e-4)
    x = torch.arange(48.0) - 24
    sigma = BLUR * 48 * 0.5
    # sampled at whole pixels, a Gaussian of one pixel has a variance of 1.000
    assert (spread.sum(0) * x**2).sum().item() == pytest.approx(sigma**2, rel=1e-3)
    assert torch.equal(spread, spread.T) or torch.allclose(spread, spread.T, atol=1e-6)


def test_colour_goes_towards_the_grey_of_the_same_luma() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    pale = (degrade(red, draws(1, colour=1.0))[0, :, 0, 0] + 1) / 2
    assert pale.tolist() == pytest.approx([0.299 + (1 - COLOUR) * 0.701, *[0.299 * COLOUR] * 2], abs=1e-6)


def test_light_falls_from_one_corner_of_the_angle_to_the_other() -> None:
    white = torch.ones(1, 3, 9, 9)
    lit = (degrade(white, draws(1, light=1.0))[0, 0] + 1) / 2  # angle 0: dark at the right
    assert torch.allclose(lit, lit[:1].expand(9, 9))
    ends = [(1 - x / math.sqrt(2)) / 2 for x in (1, -1)]
    assert [lit[0, 0].item(), lit[0, -1].item()] == pytest.approx([1 - LIGHT * e for e in ends], abs=1e-6)


def test_noise_has_the_given_deviation() -> None:
    grey = torch.zeros(2, 3, 24, 24)
    noisy = (degrade(grey, draws(2, side=24, noise=0.5)) + 1) / 2
    assert noisy.std((1, 2, 3)).tolist() == pytest.approx([NOISE / 2] * 2, rel=1e-4)


def test_draws_belong_to_the_sample() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    both, second = Draws.of(generators(4, 5), 8), Draws.of(generators(5), 8)
    assert torch.equal(both.noise[1], second.noise[0]) and torch.equal(both.strengths[1], second.strengths[0])
    many = Draws.of(generators(*range(400)), 2).strengths
    assert many.min() == 0 and many.max() < 1
    assert (many > 0).float().mean().item() == pytest.approx(0.6, abs=0.05)


def test_but_one_differs_in_one_degradation_and_in_the_noise() -> None:
    first = Draws.of([torch.Generator().manual_seed(s) for s in range(300)], 3)
    second = first.but_one([torch.Generator().manual_seed(1000 + s) for s in range(300)])
    changed = first.strengths != second.strengths
    assert (changed.sum(1) == 1).all() and changed.float().mean(0).tolist() == pytest.approx(
        [0.25] * 4, abs=0.07
    )
    assert second.strengths.min() >= 0 and second.strengths.max() < 1
    assert torch.equal(first.angle, second.angle) and not (first.noise == second.noise).any()
