import torch

from spo.diffusion.noise import SampleNoise, generator


def test_noise_belongs_to_the_sample() -> None:
    """Neither the other samples, nor the order, nor the batch size changes it."""
    shape = (2, 3, 3)
    together = SampleNoise(7, ["a", "b", "c"], shape)
    first, second = together.draw(), together.draw()
    alone = SampleNoise(7, ["c"], shape)
    assert torch.equal(alone.draw(), first[2:]) and torch.equal(alone.draw(), second[2:])
    other = SampleNoise(7, ["c", "a"], shape)
    assert torch.equal(other.draw(), first[[2, 0]])


def test_seeds_keys_and_their_types_differ() -> None:
    draws = [SampleNoise(s, [k], (8,)).draw() for s, k in [(0, 1), (1, 1), (0, 2), (0, "1"), (0, "x")]]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0], SampleNoise(0, [1], (8,)).draw())


def test_seed_of_a_key_never_changes() -> None:
    """Pinned: results of another version stay comparable, and Python's hash() plays no part."""
    assert generator(0, "a").initial_seed() == 4871736362253179925


def test_many_draws_are_single_draws_in_order() -> None:
    many, single = (SampleNoise(3, [1, 2], (4, 4)) for _ in range(2))
    drawn = many.draw_many(3)
    assert drawn.shape == (3, 2, 4, 4)
    assert all(torch.equal(drawn[i], single.draw()) for i in range(3))
    assert torch.equal(many.draw(), single.draw())


def test_standard_normal() -> None:
    drawn = SampleNoise(0, range(50), (20, 20)).draw()
    assert abs(float(drawn.mean())) < 0.03 and abs(float(drawn.std()) - 1) < 0.03
    # samples are not copies of each other: correlations of 400 numbers stay small
    correlations = torch.corrcoef(drawn.flatten(1)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.25


def test_dtype() -> None:
    single, half = (SampleNoise(0, [1], (4,), dtype=d).draw() for d in (torch.float32, torch.float16))
    assert half.dtype == torch.float16 and torch.equal(half, single.half())


def test_integers_are_uniform_and_belong_to_the_sample() -> None:
    noise = SampleNoise(0, range(4000), ())
    drawn = noise.integers(4)
    assert drawn.dtype == torch.int64 and len(noise) == 4000
    counts = torch.bincount(drawn, minlength=4)
    assert len(counts) == 4
    # chi-square with 3 degrees of freedom: above 16.3 once in 1,000
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 16.3
    assert torch.equal(SampleNoise(0, [3999, 5], ()).integers(4), drawn[[3999, 5]])
