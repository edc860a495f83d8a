"""Where candidates are drawn, which two make a pair, and which one the rollout continues from."""

from functools import partial

import pytest
import spo_settings
import torch
from spo_settings import PROMPTS

from spo.diffusion import ddim
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.spo import SpoMethod
from spo.methods.stepwise import pairs as step_pairs
from spo.types import Budget

# One batch holds all pairs of an iteration over all prompts.
settings = partial(spo_settings.settings, prompts_per_iteration=5, batch_size=1000, divert_start_step=0)


@pytest.mark.parametrize(
    ("count", "changes", "expected"),
    [
        (5, {"divert_start_step": 2}, [[2], [3], [4]]),
        (5, {"timestep_range": (1, 601)}, [[1], [2], [3], [4]]),
        (5, {"timestep_range": (201, 1000)}, [[0], [1], [2], [3]]),
        (5, {"timestep_range": (201, 601), "divert_start_step": 2}, [[2], [3]]),
        (5, {"inner_steps": 2}, [[0, 1], [2, 3, 4]]),  # no block begins at the last step
        (5, {"inner_steps": 3}, [[0, 1, 2], [3, 4]]),
        (5, {"inner_steps": 9}, [[0, 1, 2, 3, 4]]),
        (5, {"inner_steps": 3, "divert_start_step": 4}, [[4]]),
        (20, {"inner_steps": 3, "divert_start_step": 4}, [[4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15]]),
    ],
)
def test_blocks(backbone, count, changes, expected) -> None:
    schedule = Schedule.from_config(backbone.scheduler_config, count)
    found = step_pairs.blocks(settings(**changes), schedule)
    if count == 20:  # as the official SDXL code: its last block has four steps
        expected = [*expected, [16, 17, 18, 19]]
    assert found == expected


def test_a_range_without_a_step_is_one_line(schedule) -> None:
    with pytest.raises(ValueError, match=r"leaves no step of 5 within timestep_range \[300, 350\]"):
        step_pairs.blocks(settings(timestep_range=(300, 350)), schedule)
    with pytest.raises(ValueError, match="must have the lowest timestep first"):
        settings(timestep_range=(750, 0))


def test_thresholds_follow_step_timestep_or_sigma(schedule) -> None:
    def values(**changes) -> list[float]:
        config = settings(threshold=0.6, threshold_end=0.2, divert_start_step=1, **changes)
        return step_pairs.thresholds(config, schedule, [[1], [2, 3], [4]])

    assert values() == pytest.approx([0.6, 0.4, 0.2])
    assert values(threshold_by="timestep") == pytest.approx([0.6, 0.2 + 0.4 * 400 / 600, 0.2])
    sigma = [float(ddim.standard_deviation(schedule, torch.tensor([t]), 1.0)) for t in (601, 401, 1)]
    middle = 0.2 + 0.4 * (sigma[1] - sigma[2]) / (sigma[0] - sigma[2])
    assert values(threshold_by="sigma") == pytest.approx([0.6, middle, 0.2])
    assert step_pairs.thresholds(settings(threshold_by="sigma"), schedule, [[4]]) == [0.0]


def test_random_pairs_are_two_candidates_in_order() -> None:
    scores = torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
    noise = SampleNoise(0, range(600), (1,))
    win, lose, valid = step_pairs.random_pairs(scores, 0.3, noise)
    every = torch.arange(600)
    assert (win != lose).all() and (scores[win, every] > scores[lose, every]).all()
    shares = torch.stack([scores[win, every], scores[lose, every]]).softmax(0)
    assert torch.equal(valid, shares[0] - shares[1] > 0.3)
    both = {tuple(sorted(p)) for p in zip(win.tolist(), lose.tolist(), strict=True)}
    assert len(both) == 6  # every two of four
    best = (win == scores.argmax(0)).float().mean()
    assert 0.43 < best < 0.57  # the best one is in half of them


@pytest.mark.parametrize("resampler", ["win", "lose", "random"])
def test_the_rollout_continues_from_the_resampler(backbone, reward_model, schedule, resampler) -> None:
    config = settings(resampler=resampler, candidates=2)
    ((batch,),), _ = SpoMethod(config, schedule, reward_model, PROMPTS, seed=0).collect(backbone, 0)
    rows = {}
    for i, t in enumerate(batch.timesteps.tolist()):
        rows[t, float(batch.conditioning.tensors["length"][i])] = i
    won = []
    for (t, length), i in rows.items():
        if t > 200:
            following = batch.x_t[rows[t - 200, length]]
            won.append(torch.equal(following, batch.x_win[i]))
            assert won[-1] or torch.equal(following, batch.x_lose[i])
    assert len(won) == 20
    assert {"win": all(won), "lose": not any(won), "random": 2 < sum(won) < 18}[resampler]


def test_inner_steps_share_their_scores_and_diverge_after_the_first(backbone, reward_model, schedule) -> None:
    """Five steps in blocks of two: [0, 1] and [2, 3, 4]."""
    config = settings(inner_steps=2, candidates=3)
    ((batch,),), metrics = SpoMethod(config, schedule, reward_model, PROMPTS, seed=0).collect(backbone, 0)
    assert [t.unique().tolist() for t in reward_model.timesteps] == [[401], [0]]
    assert [len(t) for t in reward_model.timesteps] == [15, 15]
    pairs, diverged = len(batch.weight), 3 * 5
    assert pairs == metrics["pairs"] == 25 and len(batch.x_t) == pairs + diverged == len(batch.conditioning)
    lose_row, length = batch.lose_row, batch.conditioning.tensors["length"]
    assert torch.equal(batch.timesteps[lose_row], batch.timesteps[:pairs])
    assert torch.equal(length[lose_row], length[:pairs])
    row = {
        (t, float(n)): i
        for i, (t, n) in enumerate(zip(batch.timesteps[:pairs].tolist(), length[:pairs], strict=True))
    }
    for (t, n), i in row.items():
        first_of_block = t in (801, 401)
        assert (int(lose_row[i]) == i) == first_of_block
        if not first_of_block:  # each branch continues from where it was
            before = row[t + 200, n]
            assert torch.equal(batch.x_t[i], batch.x_win[before])
            assert torch.equal(batch.x_t[lose_row[i]], batch.x_lose[before])
    # the scored images, at the end of the rollout, are those of the last pairs
    for (t, _), i in row.items():
        if t == 1:
            assert any(torch.equal(batch.x_win[i], image) for image in reward_model.images[-1])


def test_the_loss_of_diverged_branches_is_that_of_two_forwards(backbone, reward_model, schedule) -> None:
    config = settings(inner_steps=2, beta=3.0, clip=0.9)
    method = SpoMethod(config, schedule, reward_model, PROMPTS, seed=0)
    ((batch,),), _ = method.collect(backbone, 0)
    backbone.shift.data.fill_(0.01)
    denoiser = GuidedDenoiser.of(backbone, batch.conditioning, method.guidance)
    outputs = [denoiser(batch.x_t, batch.timesteps, reference=r) for r in (False, True)]
    losses, _ = method.loss(*outputs, batch)
    for p, rows in enumerate(zip(range(len(batch.weight)), batch.lose_row.tolist(), strict=True)):
        ratios = []
        for i, name in zip(rows, ("x_win", "x_lose"), strict=True):
            one = slice(i, i + 1)
            single = GuidedDenoiser.of(backbone, batch.conditioning.select(one), method.guidance)
            logs = []
            for reference in (False, True):
                output = single(batch.x_t[one], batch.timesteps[one], reference=reference)
                step = ddim.transition(schedule, output, batch.timesteps[one], batch.x_t[one], 1.0)
                logs.append(ddim.log_prob(step, getattr(batch, name)[p : p + 1]))
            ratios.append(logs[0] - logs[1])
        expected = -torch.nn.functional.logsigmoid(3.0 * (ratios[0] - ratios[1]))
        assert torch.allclose(losses[p : p + 1], expected, atol=1e-5)
    assert losses.std() > 1e-4  # they do differ


def test_no_two_updates_share_a_part(backbone, reward_model, schedule) -> None:
    config, backbone.budget = settings(batch_size=6), Budget(pairs=3)
    updates, metrics = SpoMethod(config, schedule, reward_model, PROMPTS, seed=0).collect(backbone, 0)
    assert metrics["pairs"] == 25
    assert [[len(b.weight) for b in parts] for parts in updates] == [[3, 3]] * 4 + [[1]]


def test_a_flow_has_no_candidates_at_its_first_and_last_step(flow) -> None:
    """The first starts from pure noise, the last has no variance."""
    schedule = flow.schedule(5)
    assert step_pairs.blocks(settings(), schedule) == [[1], [2], [3]]
    assert step_pairs.blocks(settings(timestep_range=(0, 900)), schedule) == [[2], [3]]
    config = settings(threshold=0.6, threshold_end=0.2, threshold_by="timestep")
    middle = 0.2 + 0.4 * (818.1818 - 666.6667) / (923.0769 - 666.6667)
    assert step_pairs.thresholds(config, schedule, [[1], [2], [3]]) == pytest.approx([0.6, middle, 0.2])
