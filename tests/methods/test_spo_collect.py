import math
from dataclasses import replace

import pytest
import torch
from spo_settings import PROMPTS, settings

from spo.diffusion import ddim
from spo.diffusion.denoiser import GuidedDenoiser
from spo.diffusion.finite import FiniteCheck
from spo.diffusion.schedule import Schedule
from spo.methods.spo import SpoMethod
from spo.methods.stepwise.method import sampler_schedule
from spo.methods.stepwise.rollout import Rollout
from spo.training.alignment import Alignment
from spo.types import FIRST_UPDATE, Budget, Conditioning


def together(batches) -> dict[str, torch.Tensor]:
    """All pairs of an iteration."""
    rows = [
        {
            **{name: getattr(b, name) for name in ("x_t", "timesteps", "weight", "x_win", "x_lose")},
            **b.conditioning.tensors,
        }
        for b in batches
    ]
    return {k: torch.cat([r[k] for r in rows]) for k in rows[0]}


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p.values(), q.values(), strict=True)
    )


def rows(batches):
    return [together([b]) for b in batches]


def collect(method, backbone, iteration=0):
    """The batches of an iteration, one for each update, and its metrics."""
    updates, metrics = method.collect(backbone, iteration)
    assert all(len(parts) == 1 for parts in updates)
    return [batch for (batch,) in updates], metrics


class StairNoise:
    """Candidate k lies k standard deviations above the mean; the rollout continues from number 1."""

    def __init__(self, count, shape) -> None:
        self.size = (count, *shape)

    def draw(self):
        return torch.zeros(self.size)

    def draw_many(self, k):
        return torch.arange(float(k)).view(-1, 1, 1, 1, 1).expand(k, *self.size)

    def integers(self, high):
        return torch.ones(self.size[0], dtype=torch.int64)


def stairs(backbone, reward_model, schedule):
    """The pairs of three prompts at each step, by StairNoise."""
    rollout = Rollout(settings(), schedule, reward_model)
    return list(rollout.run(backbone, PROMPTS[:3], StairNoise(3, backbone.latent_shape)))


def test_pairs_are_drawn_from_the_transition_at_x_t(backbone, reward_model, schedule) -> None:
    """With candidates at known places: the best lies K-1 deviations up, the worst at the mean.

    The transition is computed anew here, so a wrongly reused model output would show.
    """
    steps = stairs(backbone, reward_model, schedule)
    assert [int(schedule.timesteps[pairs.step]) for pairs in steps] == [401, 201, 1]
    starts = []
    for pairs in steps:
        assert pairs.valid.all() and len(pairs.x_t) == 3
        timesteps = schedule.timesteps[pairs.step].expand(3)
        output = GuidedDenoiser.of(backbone, pairs.conditioning, 2.0)(pairs.x_t, timesteps).detach()
        step = ddim.transition(schedule, output, timesteps, pairs.x_t, eta=1)
        up = (pairs.x_win - step.mean) / step.std
        assert torch.allclose(up, torch.full_like(up, 3.0), atol=1e-3)
        assert torch.allclose(pairs.x_lose, step.mean, atol=1e-4)
        starts.append((pairs.x_t, step.mean + step.std))
    for (_, candidate), (following, _) in zip(starts, starts[1:], strict=False):
        assert torch.allclose(following, candidate, atol=1e-4)  # candidate 1 starts the next step


def test_candidates_are_scored_at_their_own_timestep(backbone, reward_model, schedule) -> None:
    """x_0 predicted from the candidate at the next timestep; at the end the latents themselves, at 0."""
    steps = stairs(backbone, reward_model, schedule)
    assert [t.unique().tolist() for t in reward_model.timesteps] == [[201], [1], [0]]
    assert [len(t) for t in reward_model.timesteps] == [12, 12, 12]
    assert reward_model.texts == [PROMPTS[:3]]
    # each image with its own prompt
    assert all(asked.tolist() == [1.0, 2.0, 3.0] * 4 for asked in reward_model.lengths)
    for side in (steps[-1].x_win, steps[-1].x_lose):
        for latents in side:
            assert any(torch.equal(latents, image) for image in reward_model.images[-1])
    winners, length = steps[0].x_win, torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1, 1)
    output = 0.5 * winners + 2.0 * 0.5 * length.sin() + 0.201  # guidance 2, by hand
    for x_0 in schedule.predict_x0(output, torch.full((3,), 201), winners):
        assert any(torch.allclose(x_0, image, atol=1e-4) for image in reward_model.images[0])


def test_unet_work(backbone, reward_model, schedule) -> None:
    """Guidance doubles each call; outputs at candidates serve the next step, so none is computed twice."""
    collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    assert backbone.predicted == [2 * 3, 2 * 3, 2 * 3, 2 * 12, 2 * 12]
    assert len(backbone.encoded) == 2  # the prompts and the empty ones, once


def test_guidance_of_one_needs_no_empty_prompts(backbone, reward_model, schedule) -> None:
    collect(SpoMethod(settings(guidance=1.0), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    assert backbone.predicted == [3, 3, 3, 12, 12]
    assert len(backbone.encoded) == 1


def test_winner_has_the_higher_score(backbone, reward_model, schedule) -> None:
    """At the last step the score is the mean of the latents."""
    batches, _ = collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    pairs = together(batches)
    last = pairs["timesteps"] == 1
    assert int(last.sum()) == 3
    assert (pairs["x_win"][last].mean((1, 2, 3)) > pairs["x_lose"][last].mean((1, 2, 3))).all()


def test_next_step_starts_from_a_uniformly_random_candidate(backbone, reward_model, schedule) -> None:
    """With two candidates, x_t of a step is the winner or the loser of the step before."""
    prompts = [f"prompt {'x' * i}" for i in range(300)]
    config = settings(candidates=2, prompts_per_iteration=300, batch_size=10_000)
    pairs = together(collect(SpoMethod(config, schedule, reward_model, prompts, seed=0), backbone, 0)[0])
    at = {t: {k: v[pairs["timesteps"] == t] for k, v in pairs.items()} for t in (401, 201)}
    from_winner = 0
    for length, x_t in zip(at[201]["length"], at[201]["x_t"], strict=True):
        i = (at[401]["length"] == length).nonzero().item()
        won, lost = torch.equal(x_t, at[401]["x_win"][i]), torch.equal(x_t, at[401]["x_lose"][i])
        assert won != lost
        from_winner += won
    assert len(at[201]["x_t"]) == 300
    assert 120 < from_winner < 180  # 3.5 standard deviations


def test_collect_is_a_function_of_seed_and_iteration(backbone, reward_model, schedule) -> None:
    method = SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0)
    first, second = (rows(collect(method, backbone, i)[0]) for i in (0, 1))
    fresh = SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0)
    assert same(rows(collect(fresh, backbone, 1)[0]), second)  # without iteration 0 before it
    assert same(rows(collect(fresh, backbone, 0)[0]), first)
    assert not same(first, second)
    orders = [[t for r in batches for t in r["timesteps"].tolist()] for batches in (first, second)]
    assert orders[0] != orders[1]  # shuffled anew
    other = SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=1)
    assert not same(rows(collect(other, backbone, 0)[0]), first)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_change_nothing(backbone, reward_model, schedule, chunk: int) -> None:
    whole, metrics = collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    backbone.budget = Budget(samples=chunk)
    reward_model.images.clear()
    cut, cut_metrics = collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    assert max(len(images) for images in reward_model.images) == min(chunk, 12)
    assert same(rows(cut), rows(whole)) and cut_metrics == pytest.approx(metrics)


def test_noise_of_a_prompt_does_not_depend_on_the_others(backbone, reward_model, schedule) -> None:
    config = settings(prompts_per_iteration=5)
    found = []
    for prompts in (PROMPTS, ["a", "x" * 9, "y" * 12, "z" * 15, "w" * 18]):
        pairs = together(collect(SpoMethod(config, schedule, reward_model, prompts, seed=0), backbone, 0)[0])
        mine = pairs["length"] == 1
        found.append(sorted(pairs["x_t"][mine].flatten(1).tolist()))
    assert len(found[0]) == 3
    assert torch.allclose(*(torch.tensor(f) for f in found), atol=1e-5)


def test_every_prompt_once_an_epoch(backbone, reward_model, schedule) -> None:
    method = SpoMethod(settings(prompts_per_iteration=2), schedule, reward_model, PROMPTS[:4], seed=0)
    for iteration in range(4):
        collect(method, backbone, iteration)
    seen = [reward_model.texts[0] + reward_model.texts[1], reward_model.texts[2] + reward_model.texts[3]]
    assert [sorted(epoch) for epoch in seen] == [PROMPTS[:4]] * 2


def test_batches(backbone, reward_model, schedule) -> None:
    batches, metrics = collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)
    assert [len(b.x_t) for b in batches] == [4, 4, 1] and metrics["pairs"] == 9
    for batch in batches:
        assert batch.weight.tolist() == [1.0] * len(batch.x_t)
        assert len(batch.conditioning) == len(batch.timesteps) == len(batch.x_t)
        assert batch.lose_row is None
    timesteps = together(batches)["timesteps"].tolist()
    assert timesteps != sorted(timesteps, reverse=True)  # shuffled over the steps


def test_only_valid_pairs_are_used(backbone, reward_model, schedule) -> None:
    method = SpoMethod(settings(threshold=0.05), schedule, reward_model, PROMPTS, seed=0)
    batches, metrics = collect(method, backbone, 0)
    pairs = together(batches)
    assert 0 < metrics["pairs"] < 9 and len(pairs["x_t"]) == metrics["pairs"]
    assert metrics["valid_fraction"] == pytest.approx(metrics["pairs"] / 9)
    last = pairs["timesteps"] == 1
    assert 0 < int(last.sum()) == pytest.approx(3 * metrics["valid_fraction/t0001"])
    gap = 10 * (pairs["x_win"] - pairs["x_lose"])[last].mean((1, 2, 3))
    assert (torch.tanh(gap / 2) > 0.05).all()


def test_without_a_valid_pair_one_batch_of_weight_zero(backbone, reward_model, schedule) -> None:
    method = SpoMethod(settings(threshold=0.999999), schedule, reward_model, PROMPTS, seed=0)
    (batch,), metrics = collect(method, backbone, 0)
    assert metrics["pairs"] == 0 and metrics["valid_fraction"] == 0
    assert batch.weight.tolist() == [0.0] and len(batch.x_t) == 1
    output = backbone.predict(batch.x_t, batch.timesteps, batch.conditioning)
    losses, values = method.loss(output, output.detach(), batch)
    assert losses.isfinite().all() and all(v.tolist() == [0] for v in values.values())


class GapRewards:
    """Scores 0, 1, 0, 1, ...: every gap is tanh(1 / 2) = .462."""

    needs_images = True

    def encode_text(self, prompts):
        return Conditioning({"nothing": torch.zeros(len(prompts))})

    def score(self, candidates, text):
        assert len(candidates.images) % 2 == 0
        return torch.arange(len(candidates.images)).fmod(2).float()


def test_threshold_goes_linearly_to_its_end(backbone, schedule) -> None:
    """.2, .4, .6 at t = 401, 201, 1, against gaps of .462."""
    config = settings(prompts_per_iteration=1, threshold=0.2, threshold_end=0.6)
    _, metrics = collect(SpoMethod(config, schedule, GapRewards(), PROMPTS, seed=0), backbone, 0)
    valid = {k: v for k, v in metrics.items() if k.startswith("valid_fraction/")}
    assert valid == {"valid_fraction/t0401": 1, "valid_fraction/t0201": 1, "valid_fraction/t0001": 0}
    scores = {k: v for k, v in metrics.items() if k.startswith("score")}
    names = ("score", "score/t0401", "score/t0201", "score/t0001")
    assert scores == {name: pytest.approx(0.5) for name in names}


def test_a_last_step_without_variance_gives_no_pair(backbone, reward_model) -> None:
    to_one = Schedule.from_config({**backbone.scheduler_config, "set_alpha_to_one": True}, 5)
    batches, metrics = collect(SpoMethod(settings(), to_one, reward_model, PROMPTS, seed=0), backbone, 0)
    assert [t.unique().tolist() for t in reward_model.timesteps] == [[201], [1]]
    assert set(together(batches)["timesteps"].tolist()) == {401, 201} and metrics["pairs"] == 6


def test_batches_can_be_trained_on(backbone, reward_model, schedule) -> None:
    """They come out of inference mode, yet serve a backward pass; a step along it helps."""
    method = SpoMethod(settings(batch_size=100), schedule, reward_model, PROMPTS, seed=0)
    (batch,), _ = collect(method, backbone, 0)
    denoiser = GuidedDenoiser.of(backbone, batch.conditioning, method.guidance)

    def mean_loss() -> torch.Tensor:
        outputs = [denoiser(batch.x_t, batch.timesteps, reference=r) for r in (False, True)]
        return method.loss(outputs[0], outputs[1].detach(), batch)[0].mean()

    before = mean_loss()
    before.backward()
    assert float(backbone.shift.grad) != 0
    with torch.no_grad():
        backbone.shift -= 1e-3 * backbone.shift.grad.sign()
    assert float(mean_loss().detach()) < float(before.detach())


def test_a_score_that_is_not_finite_stops(backbone, reward_model, schedule) -> None:
    reward_model.scale = float("nan")
    with pytest.raises(ValueError, match=r"preference model's score at step 4 of 5 \(t=201\), prompt '"):
        collect(SpoMethod(settings(), schedule, reward_model, PROMPTS, seed=0), backbone, 0)


def test_a_flow_is_rolled_out_and_trained_at_its_own_timesteps(flow, reward_model) -> None:
    """Candidates lie within five deviations of the transition at x_t; without a change the loss is log 2."""
    method = SpoMethod(
        settings(divert_start_step=0), sampler_schedule(settings(), flow), reward_model, PROMPTS, 0
    )
    (first, *_), metrics = collect(method, flow)
    assert {name for name in metrics if name.startswith("score/")} == {
        "score/t0923",
        "score/t0818",
        "score/t0667",
    }
    visited = method.schedule.timesteps.tolist()
    assert first.timesteps.dtype == torch.float32 and set(first.timesteps.tolist()) <= set(visited[1:4])
    assert {round(float(t), 3) for asked in reward_model.timesteps for t in asked} == {
        818.182,
        666.667,
        428.571,
    }
    output = GuidedDenoiser.of(flow, first.conditioning, 2.0)(first.x_t, first.timesteps).detach()
    step = ddim.transition(method.schedule, output, first.timesteps, first.x_t, eta=1)
    for candidates in (first.x_win, first.x_lose):
        assert float(((candidates - step.mean) / step.std).abs().max()) < 5
    losses, _ = method.loss(output, output, first)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("name", ["backbone", "flow"])
def test_the_gauges_of_the_first_update(request, reward_model, name, inner_steps) -> None:
    """Policy and reference are the same, and in fp32 the log-probs of the rollout are those of the update but
    for the order of sums; a change of either is what the gauge shows."""
    model = request.getfixturevalue(name)
    section = settings(inner_steps=inner_steps, divert_start_step=1, batch_size=1000)
    method = SpoMethod(section, sampler_schedule(section, model), reward_model, PROMPTS, seed=0)
    objective = Alignment("align.spo", model, method)
    (((batch,),), _), (((later,),), _) = (objective.collect(iteration) for iteration in (0, 1))
    assert batch.first and not later.first

    def gauges(batch) -> list[float]:
        _, metrics = objective.loss(batch, FiniteCheck())
        names = (f"{FIRST_UPDATE}policy_to_reference", f"{FIRST_UPDATE}rollout_to_policy")
        return [float(metrics[name].values.max()) for name in names]

    same, drawn = gauges(batch)
    assert same == 0 and drawn < 1e-5
    assert gauges(replace(batch, log_probs=batch.log_probs - 0.25))[1] == pytest.approx(0.25, rel=1e-4)
    with torch.no_grad():
        model.shift.add_(0.01)
    changed, moved = gauges(batch)
    _, metrics = objective.loss(later, FiniteCheck())
    assert changed > 1e-4 and moved == pytest.approx(changed, rel=0.01)
    assert not any(name.startswith(FIRST_UPDATE) for name in metrics)
