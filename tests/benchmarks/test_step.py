"""The training step in SD 1.5's shape, tried in tiny shapes."""

from benchmarks import step


def test_both_sides_give_the_same_loss_and_gradients() -> None:
    result = step.measure(tiny=True, rounds=1)
    assert result.difference < 1e-5 and result.ratio > 0
