from pathlib import Path

import pytest
import torch

from spo.scenes.oracle import Oracle, Perception, fidelity
from spo.scenes.world import CHOICES, parse

CAPTION = "a large red circle at the left on sand"  # five named attributes


def certain(attributes: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of someone who is sure to see `attributes` [8] (absent as the last class)."""
    columns = []
    for value, choices in zip(attributes.tolist(), CHOICES, strict=True):
        row = torch.full((1, len(choices) + 1), -20.0)
        row[0, value if value >= 0 else len(choices)] = 0
        columns.append(row)
    return columns


def test_fidelity_counts_named_attributes_only() -> None:
    assert fidelity(certain(parse(CAPTION)), [CAPTION]).item() == 1
    wrong_colour = parse("a large blue circle at the left on sand")
    assert fidelity(certain(wrong_colour), [CAPTION]).item() == pytest.approx(4 / 5)
    # a second shape that was not asked for is seen by the layout alone
    pair = parse("a large red circle left of a small blue star on sand")
    assert fidelity(certain(pair), [CAPTION]).item() == pytest.approx(4 / 5)


def test_soft_fidelity_is_the_mean_probability() -> None:
    columns = certain(parse(CAPTION))
    columns[3] = torch.full((1, len(CHOICES[3]) + 1), 0.25).log()
    assert fidelity(columns, [CAPTION], soft=True).item() == pytest.approx(4.25 / 5)


def test_saved_and_loaded_is_the_same_to_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Perception(8).eval()
    model.save(tmp_path / "oracle")
    images = torch.rand(3, 3, 48, 48) * 2 - 1
    first, second = model.perceive(images)[0], Perception.load(tmp_path / "oracle").perceive(images)[0]
    assert torch.allclose(first, second, atol=5e-3)
    scores = Oracle(tmp_path / "oracle").score(images, [CAPTION] * 3)
    assert scores["oracle_aesthetic"] == pytest.approx(second.mean(1).tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gets_no_score(tmp_path: Path, value: float) -> None:
    """Of NaN, the most probable attribute is the first, so fidelity would be a number."""
    Perception(8).save(tmp_path / "oracle")
    oracle, images = Oracle(tmp_path / "oracle"), torch.zeros(2, 3, 48, 48)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"oracle: the pixels are NaN or infinite, prompt '{CAPTION}'"):
        oracle.score(images, ["a circle", CAPTION])
    oracle.model.quality.bias.data[0] = value
    with pytest.raises(
        ValueError, match="oracle: the network's output is NaN or infinite, prompt 'a circle'"
    ):
        oracle.score(torch.zeros(2, 3, 48, 48), ["a circle", CAPTION])
    oracle.model.quality.bias.data[0] = 0
    oracle.model.attributes[3].bias.data[0] = value
    with pytest.raises(ValueError, match="the network's output"):
        oracle.score(torch.zeros(2, 3, 48, 48), ["a circle", CAPTION])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dvc pull data.dvc"):
        Oracle(tmp_path)
    Perception(8).save(tmp_path / "oracle")
    with pytest.raises(ValueError, match="2 images, but 1 prompts"):
        Oracle(tmp_path / "oracle").score(torch.zeros(2, 3, 48, 48), [CAPTION])
