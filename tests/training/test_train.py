"""The training loop on a model of two numbers, where every step can be worked out by hand."""

import copy
import dataclasses
import os
import signal
import sys

import pytest
import torch

from spo import config
from spo.training import loop, optimizer
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import Conditioning, UNetBatch


class Numbers:
    """Predicts its two numbers, whatever it is shown; the reference predicts zeros."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.values = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.forwards = {"policy": 0, "reference": 0}

    def encode_prompts(self, prompts):
        return Conditioning({"text": torch.zeros(len(prompts), 1)})

    def predict(self, x_t, timesteps, conditioning, *, reference=False, copies=1):
        self.forwards["reference" if reference else "policy"] += 1
        values = torch.zeros(2) if reference else self.values
        return values.view(1, 2, 1, 1).expand_as(x_t)

    def trainable_parameters(self):
        return [self.values]


class Squares:
    """loss = (policy - target)^2 of each sample; one batch an iteration."""

    guidance = 1.0

    def __init__(self, iterations: int, weight: float = 1.0, target: float = 3.0) -> None:
        self.iterations, self.weight, self.target = iterations, weight, target

    def collect(self, backbone, iteration):
        x_t = torch.full((2, 2, 1, 1), float(iteration))
        conditioning = backbone.encode_prompts(["", ""])
        batch = UNetBatch(
            x_t=x_t,
            timesteps=torch.zeros(2, dtype=torch.int64),
            conditioning=conditioning,
            weight=torch.full((2,), self.weight),
        )
        return [[batch]], {"collected": float(iteration)}

    def loss(self, policy, reference, batch):
        losses = (policy - reference - self.target).square().flatten(1).sum(1)
        return losses, {"distance": (policy - reference).detach().abs().flatten(1).sum(1)}


def settings(**changes) -> config.Optimizer:
    return config.Optimizer(**{"learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": None} | changes)


def run(model, method, store=None, on_metrics=lambda m, s: None, every=1, scale_loss=False, **changes):
    options = {"checkpoints": store, "checkpoint_every": every, "on_metrics": on_metrics}
    objective = Alignment("align.squares", model, method)
    return loop.fit(objective, settings(**changes), scale_loss=scale_loss, **options)


def test_the_first_update_of_adamw_is_the_sign_of_the_gradient() -> None:
    model = Numbers()
    summary = run(model, Squares(1))
    # gradients are 2 (v - 3), both negative: AdamW's first step is +lr each
    torch.testing.assert_close(model.values.detach(), torch.tensor([1.1, -1.9]), atol=1e-6, rtol=0)
    assert summary["updates"] == 1 and summary["pairs"] == 2
    assert model.forwards == {"policy": 1, "reference": 1}


def test_weights_of_pairs_do_not_change_a_mean_of_equals() -> None:
    light, heavy = Numbers(), Numbers()
    run(light, Squares(3, weight=0.25))
    run(heavy, Squares(3, weight=4.0))
    torch.testing.assert_close(light.values, heavy.values)


def test_clipping_clips() -> None:
    norms = []

    class Watch(torch.optim.AdamW):
        def step(self):
            norms.append(float(self.param_groups[0]["params"][0].grad.norm()))

    original, torch.optim.AdamW = torch.optim.AdamW, Watch
    try:
        run(Numbers(), Squares(1))
        run(Numbers(), Squares(1), max_grad_norm=0.5)
    finally:
        torch.optim.AdamW = original
    assert norms[0] == pytest.approx((4**2 + 10**2) ** 0.5) and norms[1] == pytest.approx(0.5, rel=1e-4)


def test_warm_up_raises_the_rate_linearly() -> None:
    rates = []
    run(Numbers(), Squares(4), on_metrics=lambda m, s: rates.append(m["learning_rate"]), warmup_steps=4)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_a_batch_without_a_pair_changes_nothing() -> None:
    model = Numbers()
    summary = run(model, Squares(3, weight=0.0), weight_decay=0.5)
    assert model.values.tolist() == [1.0, -2.0]
    assert summary["updates"] == 0 and model.forwards["policy"] == 0


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, stop_at: int) -> None:
    whole, parts, store = Numbers(), Numbers(), CheckpointStore(tmp_path)
    run(whole, Squares(9))
    seen = []

    def stop(metrics, step):
        seen.append(step)
        if step == stop_at:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run(parts, Squares(9), store, stop, every=2)
    again = Numbers()
    summary = run(again, Squares(9), store, every=2)
    assert torch.equal(again.values, whole.values) and summary["updates"] == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_leaving(tmp_path, number) -> None:
    store, model = CheckpointStore(tmp_path), Numbers()

    def send(metrics, step):
        if step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="iteration 3"):
        run(model, Squares(9), store, send, every=100)
    assert store.latest()[0] == 3
    assert signal.getsignal(number) is before


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    model = Numbers()
    with pytest.raises(FloatingPointError, match="try a lower align.squares.optimizer.learning_rate"):
        run(model, Squares(3, target=float("nan")))
    assert model.values.tolist() == [1.0, -2.0]


class OneBad(Squares):
    """The second of two samples, of timestep 7, has no finite loss in iteration 1."""

    def collect(self, backbone, iteration):
        ((batch,),), collected = super().collect(backbone, iteration)
        changes = {"timesteps": torch.tensor([3, 7]), "prompts": ["a ring", "a star"]}
        return [[dataclasses.replace(batch, **changes)]], collected

    def loss(self, policy, reference, batch):
        losses, metrics = super().loss(policy, reference, batch)
        return losses / (1 - batch.x_t[:, 0, 0, 0] * torch.tensor([0.0, 1.0])), metrics


def test_it_names_update_timestep_and_prompt_and_keeps_the_last_checkpoint(tmp_path) -> None:
    model, store = Numbers(), CheckpointStore(tmp_path)
    with pytest.raises(FloatingPointError, match="loss inf at update 2, timestep 7, prompt 'a star'"):
        run(model, OneBad(3), store, every=1)
    assert store.latest()[0] == 1
    assert torch.equal(model.values.detach(), store.latest()[1]["weights"][0])


def test_a_watch_is_called_at_the_start_and_after_each_iteration_and_can_stop() -> None:
    seen = []

    def watch(iteration, metrics, updates) -> None:
        seen.append((iteration, updates, "loss" in metrics))
        if iteration == 2:
            raise ValueError("enough")

    model = Numbers()
    with pytest.raises(ValueError, match="enough"):
        loop.fit(
            Alignment("align.squares", model, Squares(5)), settings(), checkpoints=None, checkpoint_every=1,
            on_metrics=lambda metrics, step: None, watch=watch,
        )  # fmt: skip
    assert seen == [(0, 0, False), (1, 1, True), (2, 2, True)]


def test_nothing_to_train_is_one_line() -> None:
    model = copy.copy(Numbers())
    model.trainable_parameters = lambda: []
    with pytest.raises(ValueError, match="align.squares: nothing to train"):
        run(model, Squares(1))


class Parts(Squares):
    """One update of four unequal samples, whole or in parts of the given sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(iterations=2)
        self.sizes = sizes

    def collect(self, backbone, iteration):
        x_t = torch.arange(8.0).view(4, 2, 1, 1)
        weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
        parts, start = [], 0
        for size in self.sizes:
            rows = slice(start, start + size)
            start += size
            batch = UNetBatch(
                x_t=x_t[rows],
                timesteps=torch.zeros(size, dtype=torch.int64),
                conditioning=backbone.encode_prompts([""] * size),
                weight=weight[rows],
            )
            parts.append(batch)
        return [parts], {}

    def loss(self, policy, reference, batch):
        return (policy - batch.x_t).square().flatten(1).sum(1), {}


@pytest.mark.parametrize("sizes", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_an_update_in_parts_is_the_whole_update(sizes) -> None:
    seen, models = [], []
    for each in ([4], sizes):
        model, rows = Numbers(), []
        summary = run(model, Parts(each), on_metrics=lambda m, s, rows=rows: rows.append(m))
        assert summary["updates"] == 2 and summary["pairs"] == 2 * 3
        assert model.forwards["policy"] == 2 * len(each)
        seen.append(rows)
        models.append(model)
    torch.testing.assert_close(models[0].values, models[1].values, rtol=1e-6, atol=0)
    for whole, parts in zip(*seen, strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


def test_eight_bit_without_bitsandbytes_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optimizer.eight_bit: needs bitsandbytes.*set it to false") as error:
        run(Numbers(), Squares(1), eight_bit=True)
    assert "\n" not in str(error.value)


def test_eight_bit_takes_bitsandbytes_own() -> None:
    bits = pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert isinstance(optimizer.adamw([parameter], settings(eight_bit=True)), bits.optim.AdamW8bit)


class InHalf(Squares):
    """Computed in fp16. The larger number's gradient is 2 * 5 * scale / 2: above 65,504 for 2^14."""

    def loss(self, policy, reference, batch):
        _, metrics = super().loss(policy, reference, batch)
        losses = (policy.half() - reference.half() - self.target).square().flatten(1).sum(1)
        return losses.float(), metrics


def test_half_precision_scales_the_loss_and_leaves_out_what_overflows(tmp_path) -> None:
    """From 2^16 on: three updates are left out; the scale of the others cancels out."""
    scaled, plain, store = Numbers(), Numbers(), CheckpointStore(tmp_path)
    run(plain, Squares(4))
    summary = run(Numbers(), InHalf(5), store, scale_loss=True)
    assert summary["skipped_updates"] == 3 and summary["updates"] == 2
    summary = run(scaled, InHalf(7), store, scale_loss=True)  # goes on, with its scale
    assert summary["skipped_updates"] == 3 and summary["updates"] == 4
    torch.testing.assert_close(scaled.values, plain.values, atol=2e-3, rtol=0)


def test_gradients_that_no_scale_makes_finite_stop() -> None:
    class Infinite(Squares):
        def loss(self, policy, reference, batch):
            losses, metrics = super().loss(policy, reference, batch)
            return losses.detach() * 0 + Steep.apply(policy).flatten(1).sum(1), metrics

    class Steep(torch.autograd.Function):
        """0 with an infinite slope."""

        @staticmethod
        def forward(ctx, x):
            return x * 0

        @staticmethod
        def backward(ctx, slope):
            return slope * float("inf")

    model = Numbers()
    with pytest.raises(FloatingPointError, match="whatever the loss is scaled by"):
        run(model, Infinite(40), scale_loss=True)
    assert model.values.tolist() == [1.0, -2.0]


class Collected(Squares):
    """Notes the weights that its batches are collected by."""

    def __init__(self, iterations: int) -> None:
        super().__init__(iterations)
        self.seen: list[list[float]] = []

    def collect(self, backbone, iteration):
        self.seen.append(backbone.values.tolist())
        return super().collect(backbone, iteration)


def test_batches_are_collected_by_the_average_of_the_weights(tmp_path) -> None:
    """The average starts as the weights and halves its distance to them at each update."""

    def fit(folder=None, stop_at: int = 0, sampler_ema: float = 0.5):
        model, method, weights = Numbers(), Collected(4), []

        def note(metrics, step) -> None:
            weights.append(model.values.tolist())
            if step == stop_at:
                raise KeyboardInterrupt

        options = {"checkpoints": CheckpointStore(folder) if folder else None, "checkpoint_every": 1}
        objective = Alignment("align.squares", model, method)
        try:
            loop.fit(objective, settings(), on_metrics=note, sampler_ema=sampler_ema, **options)
        except KeyboardInterrupt:
            return method.seen, weights
        assert model.values.tolist() == weights[-1]  # not the average
        return method.seen, weights

    seen, weights = fit()
    average = [1.0, -2.0]
    for collected, after in zip(seen, weights, strict=True):
        assert collected == pytest.approx(average, abs=1e-6)
        average = [(a + w) / 2 for a, w in zip(average, after, strict=True)]
    plain, same = fit(sampler_ema=0.0)
    assert same == weights and plain == [[1.0, -2.0], *weights[:3]] and plain[1:] != seen[1:]
    assert fit(tmp_path, stop_at=3) == (seen[:3], weights[:3])
    assert fit(tmp_path) == (seen[2:], weights[2:])  # resumed after the second iteration
