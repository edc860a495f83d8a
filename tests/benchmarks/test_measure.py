"""The harness of the benchmarks: two sides are compared before they are timed; growth with size."""

import pytest
import torch
import yaml

from benchmarks import growth, models, spo
from benchmarks.measure import Case, compare
from spo import config


@pytest.fixture
def smoke() -> models.Models:
    return models.load(config.validate(yaml.safe_load(config.preset("smoke"))))


def test_an_error_of_either_side_is_found(smoke) -> None:
    theirs = spo.Theirs(smoke, spo.settings(smoke, 2), [])
    ours = spo.Ours(smoke, theirs.settings)
    theirs.start = ours.start
    case = Case("iteration", "other", "iteration", 1, ours.iteration, theirs.iteration, 1e-4)
    case.check()
    theirs.start = [value * 1.5 for value in theirs.start]
    with pytest.raises(AssertionError, match="iteration: ours differs from other"):
        case.check()


@pytest.mark.parametrize(("unit", "given", "least"), [("image", 3, 4), ("pair", 0, 1)])
def test_fewer_results_than_there_should_be_are_found(unit: str, given: int, least: int) -> None:
    with pytest.raises(AssertionError, match=f"a: {given} results, fewer than {least}"):
        Case("a", "b", unit, 4, lambda: torch.ones(given), lambda: torch.ones(given)).check()


def test_the_sides_of_a_case_run_alternately() -> None:
    runs: list[str] = []

    def side(name: str) -> torch.Tensor:
        runs.append(name)
        return torch.ones(1)

    result = compare(Case("a", "b", "image", 1, lambda: side("ours"), lambda: side("other")), rounds=2)
    assert runs == ["ours", "other", "ours", "other", "other", "ours"]
    assert result.rounds == 2 and result.difference == 0


def test_memory_is_that_of_live_tensors() -> None:
    def run() -> None:
        one = torch.ones(2**18)  # 1 MB
        two = one + one
        del one
        two.add_(1)

    assert growth.peak_of(run) == pytest.approx(2, abs=0.01)
    curve = growth.Curve("n", "of", (1, 2, 4), (3, 6, 12), (5, 5, 5))
    assert curve.exponent == pytest.approx(1) and curve.memory_exponent == pytest.approx(0)


@pytest.mark.nightly
def test_growth_has_a_point_for_every_size(smoke, tmp_path) -> None:
    """Memory does not grow with the number of stored pairs."""
    sizes = {"prompts": (1, 2), "candidates": (2, 3), "image side": (48, 64), "stored pairs": (100, 2000)}
    found = growth.curves(smoke, sizes)
    assert {curve.name: curve.sizes for curve in found} == sizes
    assert all(len(curve.seconds) == len(curve.megabytes) == 2 for curve in found)
    assert found[-1].megabytes[1] == pytest.approx(found[-1].megabytes[0], rel=0.05)
    growth.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
