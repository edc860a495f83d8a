import torch

from tools.scenes.annotators import TASTE, TEMPERATURE, TIE, Annotators, blend


def test_value_is_layout_plus_weighted_taste() -> None:
    people = Annotators(taste=torch.tensor([0.5]), leanings=torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    value = people.value(torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.5, 0.5]]), torch.tensor([0.8]))
    assert torch.allclose(value, torch.tensor([0.8 + 0.5 * (0.7 + 0.05 + 0.05)]))


def test_choices_follow_bradley_terry_and_close_pairs_are_ties() -> None:
    people = Annotators.draw(3, torch.Generator().manual_seed(0))
    n = 20_000
    who, zero = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    generator = torch.Generator().manual_seed(1)
    label = people.compare(who, torch.full((n,), 0.1), zero, generator)
    expected = torch.sigmoid(torch.tensor(0.1 / TEMPERATURE)).item()
    assert abs(label.mean().item() - expected) < 0.01  # 3 standard errors
    assert (people.compare(who, torch.full((n,), TIE / 2), zero, generator) == 0.5).all()


def test_people_differ_but_each_ones_leanings_sum_to_one() -> None:
    people = Annotators.draw(200, torch.Generator().manual_seed(2))
    assert torch.allclose(people.leanings.sum(1), torch.ones(200), atol=1e-5)
    assert 0.8 * TASTE < people.taste.median() < 1.25 * TASTE
    assert people.taste.std() > 0.05


def test_ratings_lie_on_the_scale_and_follow_quality() -> None:
    people = Annotators.draw(1, torch.Generator().manual_seed(0))
    who = torch.zeros(5000, dtype=torch.int64)
    good, bad = (people.rate(who, torch.full((5000, 4), q), torch.Generator()) for q in (0.9, 0.1))
    assert good.min() >= 1 and good.max() <= 10
    assert 6.5 < good.mean() - bad.mean() < 8  # 9 points a unit of quality, less the ends of the scale


def test_blend() -> None:
    value = blend(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([0.5]))
    assert torch.allclose(value, torch.tensor(0.5 + TASTE / 4))
