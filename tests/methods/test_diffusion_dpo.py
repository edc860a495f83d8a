import math

import pytest
import torch

from spo.config import DiffusionDpo
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoBatch, DiffusionDpoMethod, batch_loss, diffusion_dpo_loss
from spo.types import Budget, Conditioning

ZERO = torch.zeros(1)


class FakePairs:
    """Pair i: the first image is all i, the second all -i - 1; the caption is i + 1 letters long."""

    def __init__(self, labels: list[float]) -> None:
        n = len(labels)
        self.captions = ["x" * (i + 1) for i in range(n)]
        self.label_0 = torch.tensor(labels)
        self.weight = 1 / (1.0 + torch.arange(n))

    def read(self, indices):
        first = indices.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        return first, -first - 1


def settings(**changes) -> DiffusionDpo:
    required = {"lora": {"rank": 1, "alpha": 1}, "optimizer": {"learning_rate": 1e-3}}
    return DiffusionDpo(**required, **{"iterations": 3, "batch_size": 4, **changes})


def test_loss_by_hand() -> None:
    """beta 2000: -.5 * 2000 * ((.101 - .2) - (.1 - .2)) = -1, so log(1 + e)."""
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (0.101, 0.2, 0.1, 0.2)]
    assert float(diffusion_dpo_loss(*numbers, beta=2000)) == pytest.approx(math.log(1 + math.e))


def test_loss_without_a_change_is_log_two() -> None:
    win, lose = torch.rand(2, 5)
    actual = diffusion_dpo_loss(win, lose, win, lose, beta=2000)
    assert torch.allclose(actual, torch.full((5,), math.log(2)))


def test_gradient_lowers_the_error_of_the_winner() -> None:
    """At the reference each is beta / 4 in size."""
    win, lose = ZERO.clone().requires_grad_(), ZERO.clone().requires_grad_()
    diffusion_dpo_loss(win, lose, ZERO, ZERO, beta=2000).backward()
    assert float(win.grad) == pytest.approx(500) and float(lose.grad) == pytest.approx(-500)


def test_loss_from_outputs_by_hand() -> None:
    """Two pairs of one latent number each; winners come first."""
    output = torch.tensor([1.1, 2.0, 3.0, 4.0]).view(4, 1, 1, 1)
    reference = torch.tensor([1.2, 2.0, 3.0, 4.3]).view(4, 1, 1, 1)
    batch = DiffusionDpoBatch(
        x_t=reference,
        timesteps=torch.zeros(4, dtype=torch.int64),
        conditioning=Conditioning({}),
        weight=torch.tensor([1.0, 3.0]),
        target_win=torch.ones(2, 1, 1, 1),
        target_lose=torch.full((2, 1, 1, 1), 4.0),
    )
    losses, metrics = batch_loss(output, reference, batch, beta=10.0)
    # squared errors, policy - reference: pair 0 wins .01 - .04, loses 0; pair 1 wins 0, loses -.09
    inside = [-5 * (-0.03 - 0.0), -5 * (0.0 + 0.09)]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in inside], rel=1e-5)
    assert metrics["win_error_change"].tolist() == pytest.approx([-0.03, 0.0], rel=1e-4)
    assert metrics["lose_error_change"].tolist() == pytest.approx([0.0, -0.09], rel=1e-4)
    assert metrics["implicit_accuracy"].tolist() == [1, 0]
    assert metrics["output_distance"].tolist() == pytest.approx([0.005, 0.045], rel=1e-4)


def test_batch_layout(backbone, schedule) -> None:
    """Winners, then losers; both noised with the same noise at the same t."""
    pairs = FakePairs([1.0, 0.0, 1.0, 0.0, 1.0])
    method = DiffusionDpoMethod(settings(), schedule, pairs, seed=0)
    ((batch,),), metrics = method.collect(backbone, 0)
    assert batch.x_t.shape == (8, 3, 2, 2) and metrics["pairs"] == 4
    assert torch.equal(batch.timesteps[:4], batch.timesteps[4:])
    index = batch.conditioning.tensors["length"] - 1
    assert torch.equal(index[:4], index[4:])
    noise = batch.target_win
    assert torch.equal(noise, batch.target_lose) and noise.shape == (4, 3, 2, 2)
    x0 = schedule.predict_x0(torch.cat([noise, noise]), batch.timesteps, batch.x_t).mean((1, 2, 3))
    even = index[:4] % 2 == 0  # the first image is preferred
    first, second = index[:4], -index[:4] - 1
    assert torch.allclose(x0[:4], torch.where(even, first, second), atol=1e-3)
    assert torch.allclose(x0[4:], torch.where(even, second, first), atol=1e-3)
    assert torch.allclose(batch.weight, 1 / (1 + index[:4]))
    assert method.guidance == 1


def test_ties_are_skipped_and_every_other_pair_comes_once_an_epoch(backbone, schedule) -> None:
    pairs = FakePairs([1.0, 0.5, 0.0, 0.5, 1.0, 0.0])
    method = DiffusionDpoMethod(settings(batch_size=2), schedule, pairs, seed=0)
    for epoch in range(2):
        batches = [method.collect(backbone, i)[0][0][0] for i in (2 * epoch, 2 * epoch + 1)]
        index = torch.cat([b.conditioning.tensors["length"][:2] for b in batches]) - 1
        assert sorted(index.tolist()) == [0, 2, 4, 5]


def test_timesteps_are_uniform_and_noise_is_normal(backbone, schedule) -> None:
    method = DiffusionDpoMethod(settings(batch_size=2000), schedule, FakePairs([1.0] * 2000), seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    assert int(batch.timesteps.min()) < 5 and int(batch.timesteps.max()) > 994
    counts = torch.bincount(batch.timesteps[:2000] // 250, minlength=4)
    assert float(((counts - 500.0) ** 2 / 500).sum()) < 16.3
    noise = batch.target_win
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03


def test_v_prediction_targets(backbone) -> None:
    """v = sqrt(a) eps - sqrt(1 - a) x_0 differs between winner and loser by the x_0's alone."""
    config = {**backbone.scheduler_config, "prediction_type": "v_prediction"}
    schedule = Schedule.from_config(config, 5)
    method = DiffusionDpoMethod(settings(), schedule, FakePairs([1.0] * 6), seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    index = (batch.conditioning.tensors["length"][:4] - 1).view(-1, 1, 1, 1)
    sigma = (1 - schedule.alpha(batch.timesteps[:4])).sqrt()
    difference = batch.target_win - batch.target_lose
    assert torch.allclose(difference, (-sigma * (2 * index + 1)).expand_as(difference), atol=1e-4)
    targets = torch.cat([batch.target_win, batch.target_lose])
    x0 = schedule.predict_x0(targets, batch.timesteps, batch.x_t)
    assert torch.allclose(x0[:4], index.expand(-1, 3, 2, 2), atol=1e-3)


def test_collect_is_a_function_of_seed_and_iteration(backbone, schedule) -> None:
    def collect(iteration: int, seed: int = 0) -> DiffusionDpoBatch:
        method = DiffusionDpoMethod(settings(), schedule, FakePairs([1.0] * 9), seed=seed)
        return method.collect(backbone, iteration)[0][0][0]

    assert torch.equal(collect(2).x_t, collect(2).x_t)
    assert not torch.equal(collect(2).x_t, collect(1).x_t)
    assert not torch.equal(collect(2).x_t, collect(2, seed=1).x_t)


def test_a_batch_may_be_larger_than_the_data(backbone, schedule) -> None:
    """The same pair then comes with another noise."""
    method = DiffusionDpoMethod(settings(batch_size=6), schedule, FakePairs([1.0] * 3), seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    assert len(batch.x_t) == 12 and len(batch.target_win.unique(dim=0)) == 6


def test_batches_can_be_trained_on(backbone, schedule) -> None:
    """They serve a backward pass, and winners get nearer to their target than losers."""
    method = DiffusionDpoMethod(settings(beta=1.0), schedule, FakePairs([1.0, 0.0] * 4), seed=0)
    ((batch,),), _ = method.collect(backbone, 0)

    def mean_loss() -> torch.Tensor:
        policy, reference = (
            backbone.predict(batch.x_t, batch.timesteps, batch.conditioning, reference=r)
            for r in (False, True)
        )
        return method.loss(policy, reference, batch)[0].mean()

    before = mean_loss()
    assert float(before.detach()) == pytest.approx(math.log(2))
    before.backward()
    with torch.no_grad():
        backbone.shift -= 1e-3 * backbone.shift.grad.sign()
    assert float(mean_loss().detach()) < float(before.detach())


def test_pairs_without_a_winner(schedule) -> None:
    with pytest.raises(ValueError, match="none of 2 pairs"):
        DiffusionDpoMethod(settings(), schedule, FakePairs([0.5, 0.5]), seed=0)


def test_parts_of_an_update_are_the_whole_one_cut(backbone, schedule) -> None:
    pairs = FakePairs([1.0, 0.0, 1.0, 0.0, 1.0])
    ((whole,),), metrics = DiffusionDpoMethod(settings(), schedule, pairs, seed=0).collect(backbone, 0)
    cut, backbone.budget = DiffusionDpoMethod(settings(), schedule, pairs, seed=0), Budget(pairs=2)
    (parts,), cut_metrics = cut.collect(backbone, 0)
    assert metrics == cut_metrics
    assert [len(b.weight) for b in parts] == [2, 2]
    rows = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # winners and losers of each part
    assert torch.equal(torch.cat([b.x_t for b in parts]), whole.x_t[rows])
    assert torch.equal(torch.cat([b.timesteps for b in parts]), whole.timesteps[rows])
    lengths = [b.conditioning.tensors["length"] for b in (*parts, whole)]
    assert torch.equal(torch.cat(lengths[:2]), lengths[2][rows])
    assert torch.equal(torch.cat([b.weight for b in parts]), whole.weight)
    for name in ("target_win", "target_lose"):
        assert torch.equal(torch.cat([getattr(b, name) for b in parts]), getattr(whole, name))


def test_a_flow_regresses_the_velocity_at_the_timesteps_of_its_training(flow) -> None:
    """v = eps - x_0; x_t = (1 - sigma) x_0 + sigma eps, with sigma uniform before the shift."""
    schedule = flow.schedule(20)
    method = DiffusionDpoMethod(settings(batch_size=2000), schedule, FakePairs([1.0] * 2000), seed=0)
    ((batch,),), _ = method.collect(flow, 0)
    index = (batch.conditioning.tensors["length"][:2000] - 1).view(-1, 1, 1, 1)
    noise, sigma = batch.target_win + index, (batch.timesteps[:2000] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.target_lose, noise + index + 1)
    torch.testing.assert_close(batch.x_t[:2000], (1 - sigma) * index + sigma * noise, rtol=1e-4, atol=1e-3)
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    before = sigma.flatten() / (3 - 2 * sigma.flatten())  # the shift of 3 undone
    counts = torch.histc(before, 4, 0, 1)
    assert float(((counts - 500.0) ** 2 / 500).sum()) < 16.3
