"""Updates in parts, in half precision, with eight-bit moments, and batches by averaged weights."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from two_numbers import Numbers, Squares, run, settings

from spo.training import loop, optimizer
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.types import FIRST_UPDATE, UNetBatch


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
    summary = run(scaled, InHalf(7), store, scale_loss=True)  # resumed, with its scale
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


def test_in_half_precision_an_update_without_a_pair_leaves_the_scale(tmp_path) -> None:
    """A loss of weight 0 that is not finite is none of an update's."""
    weighted, model, store = [0.0, 0.0, 1.0, 0.0], Numbers(), CheckpointStore(tmp_path)

    class Sometimes(InHalf):
        def collect(self, backbone, iteration):
            self.weight = weighted[iteration]
            return super().collect(backbone, iteration)

        def loss(self, policy, reference, batch):
            losses, metrics = super().loss(policy, reference, batch)
            return losses if self.weight else losses / 0, metrics

    summary = run(model, Sometimes(4, target=0.5), store, scale_loss=True, weight_decay=0.5)
    assert summary["updates"] == 0 and summary["skipped_updates"] == 1
    assert store.latest()[1]["scaler"]["scale"] == 2.0**15 and model.values.tolist() == [1.0, -2.0]


def test_on_cuda_adamw_needs_no_copies_of_the_weights() -> None:
    with FakeTensorMode():
        for device, fused in (("cuda", True), ("cpu", None)):
            weight = torch.nn.Parameter(torch.zeros(2, device=device))
            assert optimizer.adamw([weight], settings()).defaults["fused"] is fused


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


class Gauged(Parts):
    """Of the first update the number of each sample, however the update is cut."""

    def loss(self, policy, reference, batch):
        losses, _ = super().loss(policy, reference, batch)
        return losses, {f"{FIRST_UPDATE}number": batch.x_t[:, 0, 0, 0]} if batch.first else {}


@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]])
def test_a_gauge_of_the_first_update_is_the_largest_value_and_logged_once(sizes) -> None:
    """Samples 0, 2, 4 and 6, of which the third has no weight."""
    rows: list[dict] = []
    run(Numbers(), Gauged(sizes), on_metrics=lambda m, s: rows.append(m))
    assert [row.get(f"{FIRST_UPDATE}number") for row in rows] == [6.0, None]
    assert "loss" in rows[1]
