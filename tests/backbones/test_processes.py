"""Two processes train, draw and score as one does: a real UNet with a LoRA, a real reward model, gloo."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from group import check_alike, run_in

from spo import config
from spo.diffusion.noise import SampleNoise
from spo.diffusion.schedule import Schedule
from spo.methods.diffusion_dpo import DiffusionDpoMethod
from spo.methods.spo import SpoMethod
from spo.preference.model import ClipRewardModel
from spo.rewards.scorer import BatchedScorer
from spo.training import distributed, loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Budget, Conditioning, UNetBatch

pytestmark = pytest.mark.smoke

PROMPTS = ["a circle", "a blue star on sand", "a large red square", "a small star"]
LORA = {"rank": 2, "alpha": 2}
BATCH = UNetBatch(
    x_t=torch.zeros(4),
    timesteps=torch.zeros(4, dtype=torch.int64),
    conditioning=Conditioning({}),
    weight=torch.ones(4),
)
OPTIMIZER = {"learning_rate": 1e-3}


def spo_method(backbone, model, words) -> SpoMethod:
    """Three prompts for two processes: one and two; nine pairs, so the third update has but one."""
    settings = config.Spo(
        lora=LORA,
        optimizer=OPTIMIZER,
        iterations=3,
        prompts_per_iteration=3,
        batch_size=4,
        candidates=2,
        inner_steps=2,
        num_inference_steps=4,
        guidance=2.0,
        divert_start_step=1,
        threshold=0.0,
    )
    schedule = Schedule.from_config(backbone.scheduler_config, 4)
    return SpoMethod(settings, schedule, ClipRewardModel(model, words), PROMPTS, seed=0)


class Replayed:
    """Rollouts drawn before, of all three prompts; each process takes its share of their samples."""

    def __init__(self, rollout, backbone, iterations: int) -> None:
        self.recorded = []
        for iteration in range(iterations):
            noise = SampleNoise(iteration, PROMPTS[:3], backbone.latent_shape)
            with backbone.inference():
                self.recorded.append(list(rollout.run(backbone, PROMPTS[:3], noise)))

    def run(self, backbone, prompts, noise):
        mine = distributed.shard(torch.arange(3))
        for j in self.recorded.pop(0):
            lose = None if j.x_t_lose is None else j.x_t_lose[mine]
            parts = {
                name: getattr(j, name)[mine] for name in ("x_t", "x_win", "x_lose", "valid", "log_probs")
            }
            conditioning, scores = j.conditioning.select(mine), j.scores[:, mine]
            yield replace(j, **parts, x_t_lose=lose, conditioning=conditioning, scores=scores)


def dpo_method(backbone, pairs) -> DiffusionDpoMethod:
    """Two pairs at a time, however many processes: its beta makes what the batch's size does to the last
    digits of an error a thousand times larger."""
    settings = config.DiffusionDpo(lora=LORA, optimizer=OPTIMIZER, iterations=3, batch_size=4)
    return DiffusionDpoMethod(settings, Schedule.from_config(backbone.scheduler_config, 4), pairs, seed=0)


def fit(backbone, method) -> dict:
    """Metrics of all iterations, the last gradients and the weights."""
    seen = []
    options = {"checkpoints": None, "checkpoint_every": 9, "on_metrics": lambda m, s: seen.append(m)}
    summary = loop.fit(Alignment("align.x", backbone, method), method.config.optimizer, **options)
    parameters = backbone.trainable_parameters()
    return {
        "metrics": seen,
        "gradients": torch.cat([p.grad.flatten() for p in parameters]),
        "weights": torch.cat([p.detach().flatten() for p in parameters]),
        "counts": (summary["updates"], summary["pairs"]),
    }


@pytest.mark.parametrize("name", ["spo", "diffusion_dpo"])
def test_two_processes_train_as_one(name, load, model, words, pairs) -> None:
    backbone = load("sd")
    backbone.budget = Budget(pairs=2)
    backbone.add_lora(config.Lora(**LORA), 0)

    if name == "spo":
        method = spo_method(backbone, model, words)
        method.rollout = Replayed(method.rollout, backbone, method.iterations)
    else:
        method = dpo_method(backbone, pairs)

    (one,), several = (run_in(n, lambda: fit(backbone, method)) for n in (1, 2))
    assert len(one["metrics"]) == 3 and float(one["gradients"].abs().max()) > 0
    check_alike(one, several)


def test_rollouts_do_not_depend_on_the_number_of_processes(load, model, words) -> None:
    backbone = load("sd")
    method = spo_method(backbone, model, words)

    def body() -> list[torch.Tensor]:
        updates, metrics = method.collect(backbone, 0)
        batches = [batch for parts in updates for batch in parts]
        rows = torch.cat([torch.cat([b.x_t, b.x_win, b.x_lose]) for b in batches])
        weights = torch.cat([b.weight for b in batches])
        return [rows, weights, torch.tensor(list(metrics.values()))]

    ((_, _, metrics),), both = run_in(1, body), run_in(2, body)
    for _, _, values in both:
        torch.testing.assert_close(values, metrics, rtol=1e-4, atol=1e-5)
    assert [int(weights.sum()) for _, weights, _ in both] == [4, 5]  # 2 + 2 + 0 and 2 + 2 + 1 of nine pairs


class Uneven:
    """Process r has r + 1 updates, the only pairs of the first update being process 1's."""

    guidance, iterations = 1.0, 2

    def collect(self, backbone, iteration):
        rank = distributed.state().process_index
        x_t = torch.ones(2, *backbone.latent_shape)
        batch = UNetBatch(
            x_t=x_t,
            timesteps=torch.full((2,), 500),
            conditioning=backbone.encode_prompts(["a circle"] * 2),
            weight=torch.full((2,), float(rank)),
        )
        return [[batch]] * (rank + 1), {}

    def loss(self, policy, reference, batch):
        return (policy - batch.x_t).square().flatten(1).mean(1), {}


def test_a_process_without_pairs_takes_part_and_counts_for_nothing(load) -> None:
    class Even(Uneven):
        def collect(self, backbone, iteration):
            ((batch,), *_), _ = super().collect(backbone, iteration)
            return [[replace(batch, weight=torch.ones(2))]] * 2, {}

    backbone = load("sd")
    backbone.add_lora(config.Lora(**LORA), 0)

    def body(method) -> dict:
        method.config = config.DiffusionDpo(lora=LORA, optimizer=OPTIMIZER, iterations=2, batch_size=2)
        return fit(backbone, method)

    (one,), several = run_in(1, lambda: body(Even())), run_in(2, lambda: body(Uneven()))
    check_alike(one, several)
    assert one["counts"] == (4, 8)


def test_both_stop_where_one_gets_the_signal_and_resume_from_there(
    load, model, words, pairs, tmp_path
) -> None:
    """The signal reaches the second process only; the first has saved."""
    backbone = load("sd")
    backbone.add_lora(config.Lora(**LORA), 0)

    def body(stop: bool = False) -> dict:
        method, seen = dpo_method(backbone, pairs), []

        def note(metrics, step) -> None:
            seen.append(step)
            if stop and step == 2 and not distributed.is_main_process():
                os.kill(os.getpid(), signal.SIGTERM)

        options = {"checkpoints": CheckpointStore(tmp_path), "checkpoint_every": 9, "on_metrics": note}
        try:
            loop.fit(Alignment("align.x", backbone, method), method.config.optimizer, **options)
        except KeyboardInterrupt as stopped:
            return {"steps": seen, "message": str(stopped)}
        return {"steps": seen}

    for each in run_in(2, lambda: body(stop=True)):
        assert each["steps"] == [1, 2] and "after iteration 2" in each["message"]
    assert [each["steps"] for each in run_in(2, body)] == [[3], [3]]


def test_items_in_round_robin_and_rows_gathered() -> None:
    def body() -> dict:
        rank = distributed.state().process_index
        rows = distributed.gather(torch.arange(3.0).view(3, 1)[: rank + 1])
        flags = distributed.gather(torch.tensor([True, False])[rank:])
        mine: list[int] = []

        def square(i: int) -> int:
            mine.append(i)
            return i * i

        squares = list(distributed.map_round_robin(square, range(5)))
        return {"rows": rows.tolist(), "flags": flags.tolist(), "squares": squares, "mine": mine}

    first, second = run_in(2, body)
    assert first.pop("mine") == [0, 2, 4] and second.pop("mine") == [1, 3]
    assert first == second
    assert first == {
        "rows": [[0.0], [0.0], [1.0]],
        "flags": [True, False, False],
        "squares": [0, 1, 4, 9, 16],
    }


def test_scores_do_not_depend_on_the_number_of_processes() -> None:
    class Numbers(BatchedScorer):
        name = "x"

        def load(self, settings) -> None:
            """It has no files."""

        def score_batch(self, images, prompts) -> torch.Tensor:
            return torch.tensor([float(i) + len(p) / 10 for i, p in zip(images, prompts, strict=True)])

    def body() -> list[float]:
        return Numbers(SimpleNamespace(image_size=1), batch_size=2).score(list(range(5)), PROMPTS[:1] * 5)

    (one,) = run_in(1, body)
    assert run_in(2, body) == [one, one]


def test_fewer_pairs_than_processes_is_one_line(load, pairs) -> None:
    backbone = load("sd")

    def body() -> str:
        method = dpo_method(backbone, pairs)
        method.config = method.config.model_copy(update={"batch_size": 1})
        try:
            method.collect(backbone, 0)
        except ValueError as error:
            return str(error)
        return ""

    for message in run_in(2, body):
        assert (
            message
            == "align.diffusion_dpo.batch_size: 1 is less than the 2 processes; raise it, or use fewer"
        )


class Halves:
    """A model of which each process trains another part, and `idle` in none: weight decay is on."""

    name, iterations = "halves", 3

    def __init__(self) -> None:
        self.weights = {n: torch.nn.Parameter(torch.ones(3)) for n in ("both", "second", "idle")}

    def parameters(self):
        return list(self.weights.values())

    def collect(self, iteration):
        every = torch.arange(4.0) + iteration
        return [
            [replace(BATCH, x_t=distributed.shard(every), weight=torch.ones(4 // distributed.count()))]
        ], {}

    def loss(self, batch, check):
        late = batch.x_t >= self.iterations  # at first only in the second process's share
        losses = batch.x_t * self.weights["both"].sum()
        if bool(late.any()):
            losses = losses + late * self.weights["second"].square().sum()
        return losses, {}


def test_weights_without_gradient_are_left_alone_by_any_number_of_processes() -> None:
    """AdamW decays a weight whose gradient is 0, and not one that has none."""

    def body() -> dict[str, torch.Tensor]:
        objective = Halves()
        optimizer = config.Optimizer(learning_rate=0.01, weight_decay=0.3)
        options = {"checkpoints": None, "checkpoint_every": 9, "on_metrics": lambda m, i: None}
        loop.fit(objective, optimizer, **options)
        assert objective.weights["idle"].grad is None
        return {name: value.detach() for name, value in objective.weights.items()}

    (one,), several = run_in(1, body), run_in(2, body)
    for other in several:
        assert torch.equal(other["idle"], torch.ones(3)) and torch.equal(one["idle"], torch.ones(3))
        for name in ("both", "second"):
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=0)
            assert not torch.equal(one[name], torch.ones(3))
    assert all(torch.equal(several[0][name], several[1][name]) for name in one)
