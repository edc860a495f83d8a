"""The pure functions: choice of pairs, loss, metrics. The rollout is in test_spo_collect.py."""

import math

import pytest
import torch

from spo.config import Spo
from spo.diffusion import ddim
from spo.diffusion.schedule import Schedule
from spo.methods.spo import SpoMethod
from spo.methods.stepwise.batch import StepBatch
from spo.methods.stepwise.loss import batch_loss, spo_loss
from spo.methods.stepwise.pairs import select_pairs
from spo.types import Conditioning

ZERO = torch.zeros(1)


def settings(**changes) -> Spo:
    required = {"lora": {"rank": 1, "alpha": 1}, "optimizer": {"learning_rate": 1e-3}}
    return Spo(**required, iterations=1, prompts_per_iteration=1, batch_size=1, **changes)


def test_pairs_by_hand() -> None:
    """A softmax of two scores that are d apart differs by tanh(d / 2): .762 for 2, .100 for .2."""
    scores = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.1, 5.0], [0.0, -0.1, 5.0]])
    win, lose, valid = select_pairs(scores, 0.3)
    assert win.tolist()[:2] == [1, 1] and lose.tolist()[:2] == [2, 2]
    assert valid.tolist() == [True, False, False]
    assert select_pairs(scores, 0.77)[2].tolist() == [False, False, False]
    assert select_pairs(scores, 0.05)[2].tolist() == [True, True, False]
    assert select_pairs(scores, 0.0)[2].tolist() == [True, True, False]  # more than the threshold
    assert select_pairs(scores, torch.tensor([0.9, 0.05, 0.0]))[2].tolist() == [False, True, False]


def test_pairs_compare_best_and_worst_by_softmax() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    win, lose, valid = select_pairs(scores, 0.6)
    every = torch.arange(50)
    chosen = torch.stack([scores[win, every], scores[lose, every]])
    assert torch.equal(chosen[0], scores.amax(0)) and torch.equal(chosen[1], scores.amin(0))
    shares = chosen.softmax(0)
    assert torch.equal(valid, shares[0] - shares[1] > 0.6)
    assert 0 < int(valid.sum()) < 50


def test_loss_by_hand() -> None:
    """Log-ratios .02 and -.03, beta 10: -log sigmoid(.5) = log(1 + exp(-.5))."""
    numbers = [torch.tensor([x]) for x in (-0.98, -1.53, -1.0, -1.5)]
    actual = spo_loss(*numbers, beta=10, clip=0.1)
    assert actual.shape == (1,)
    assert float(actual) == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-5)


def test_loss_without_a_change_is_log_two() -> None:
    win, lose = torch.randn(2, 6)
    assert torch.allclose(spo_loss(win, lose, win, lose, beta=10, clip=0.1), torch.full((6,), math.log(2)))


def test_gradient_raises_the_winner_and_lowers_the_loser() -> None:
    """At the reference each is beta / 2 in size."""
    win, lose = ZERO.clone().requires_grad_(), ZERO.clone().requires_grad_()
    spo_loss(win, lose, ZERO, ZERO, beta=10, clip=0.1).backward()
    assert float(win.grad) == pytest.approx(-5) and float(lose.grad) == pytest.approx(5)


@pytest.mark.parametrize(("change", "bound"), [(0.3, 1.1), (-0.3, 0.9)])
def test_clip_stops_the_gradient_of_the_side_that_is_outside(change: float, bound: float) -> None:
    win, lose = torch.tensor([change], requires_grad=True), torch.tensor([0.01], requires_grad=True)
    actual = spo_loss(win, lose, ZERO, ZERO, beta=10, clip=0.1)
    expected = math.log(1 + math.exp(-10 * (math.log(bound) - 0.01)))
    assert float(actual.detach()) == pytest.approx(expected, rel=1e-4)
    actual.backward()
    assert float(win.grad) == 0 and float(lose.grad) > 0


def example(n: int = 4) -> tuple[torch.Tensor, StepBatch, Schedule]:
    """A reference output and a batch whose pairs were drawn from it."""
    generator = torch.Generator().manual_seed(1)
    schedule = Schedule.from_config({"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, 10)
    x_t, output, first, second = (torch.randn(n, 3, 2, 2, generator=generator) for _ in range(4))
    timesteps = schedule.timesteps[torch.arange(n) % 10]
    step = ddim.transition(schedule, output, timesteps, x_t, eta=1)
    batch = StepBatch(
        x_t=x_t,
        timesteps=timesteps,
        conditioning=Conditioning({}),
        weight=torch.ones(n),
        x_win=ddim.sample(step, first),
        x_lose=ddim.sample(step, second),
    )
    return output, batch, schedule


def test_loss_from_outputs_at_the_reference() -> None:
    output, batch, schedule = example()
    losses, metrics = batch_loss(output, output, batch, schedule, settings())
    assert torch.allclose(losses, torch.full((4,), math.log(2)))
    for name in ("win_log_ratio", "lose_log_ratio", "clipped_fraction", "implicit_accuracy"):
        assert metrics[name].tolist() == [0] * 4


def test_log_ratios_from_outputs() -> None:
    """Against torch's own normal density, for outputs that differ a little."""
    reference, batch, schedule = example()
    policy = reference + 0.01 * batch.x_t
    config = settings(eta=0.7, beta=3.0, clip=0.5)
    losses, metrics = batch_loss(policy, reference, batch, schedule, config)
    ratio = {}
    for side in ("x_win", "x_lose"):
        density = []
        for output in (policy, reference):
            step = ddim.transition(schedule, output, batch.timesteps, batch.x_t, 0.7)
            normal = torch.distributions.Normal(step.mean, step.std)
            density.append(normal.log_prob(getattr(batch, side)).mean((1, 2, 3)))
        ratio[side] = density[0] - density[1]
    torch.testing.assert_close(metrics["win_log_ratio"], ratio["x_win"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(metrics["lose_log_ratio"], ratio["x_lose"], rtol=1e-3, atol=1e-6)
    gap = ratio["x_win"] - ratio["x_lose"]
    assert torch.equal(metrics["implicit_accuracy"], (gap > 0).float())
    assert torch.allclose(losses, torch.log1p(torch.exp(-3.0 * gap)), rtol=1e-4)


def test_a_gradient_step_makes_winners_likelier_than_losers() -> None:
    reference, batch, schedule = example()
    output = reference.clone().requires_grad_()
    before, _ = batch_loss(output, reference, batch, schedule, settings())
    before.mean().backward()
    after, metrics = batch_loss(output.detach() - 0.05 * output.grad, reference, batch, schedule, settings())
    assert (after < before).all()
    assert (metrics["implicit_accuracy"] == 1).all()
    assert (metrics["win_log_ratio"] > 0).all() and (metrics["lose_log_ratio"] < 0).all()


def test_outputs_far_from_the_reference_are_clipped_without_gradient() -> None:
    reference, batch, schedule = example()
    output = (reference + 5 * torch.ones_like(reference)).requires_grad_()
    losses, metrics = batch_loss(output, reference, batch, schedule, settings(clip=0.01))
    losses.sum().backward()
    assert (metrics["clipped_fraction"] == 1).all()
    assert float(output.grad.abs().max()) == 0


@pytest.mark.parametrize(
    ("changes", "prompts", "word"),
    [
        ({"divert_start_step": 5}, ["a"], "divert_start_step"),
        ({}, [], "prompts"),
    ],
)
def test_mistakes_are_one_line(reward_model, schedule, changes: dict, prompts: list, word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        SpoMethod(settings(**changes), schedule, reward_model, prompts, seed=0)
    assert "\n" not in str(error.value)
