"""The training loop on a model of two numbers, where every step can be worked out by hand."""

import copy
import dataclasses
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import two_numbers
from two_numbers import Numbers, Squares, run, settings

from spo.training import loop
from spo.training.alignment import Alignment
from spo.training.checkpoint import CheckpointStore
from spo.training.state import TrainingState


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


def test_linear_decay_ends_at_0_with_the_training() -> None:
    """DeepSpeed's WarmupDecayLR: (total - i) / (total - warm-up) after a warm-up, here 2 of 6 iterations."""
    rates = []
    changes = {"on_metrics": lambda m, s: rates.append(m["learning_rate"]), "decay": "linear"}
    run(Numbers(), Squares(6), warmup_steps=2, **changes)
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    rates.clear()
    run(Numbers(), Squares(4), **changes)
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_linear_decay_goes_by_iterations_however_many_updates_they_have() -> None:
    class Twice(Squares):
        def collect(self, backbone, iteration):
            (update,), collected = super().collect(backbone, iteration)
            return [update, update], collected

    rates = []
    summary = run(
        Numbers(), Twice(4), on_metrics=lambda m, s: rates.append(m["learning_rate"]), decay="linear"
    )
    assert summary["updates"] == 8 and rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_resumed_decay_is_the_uninterrupted_one(tmp_path) -> None:
    whole, parts, store = Numbers(), Numbers(), CheckpointStore(tmp_path)
    run(whole, Squares(6), warmup_steps=1, decay="linear")

    def stop(metrics, step):
        if step == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run(parts, Squares(6), store, stop, warmup_steps=1, decay="linear")
    rates = []
    again = Numbers()
    note = lambda m, s: rates.append(m["learning_rate"])  # noqa: E731
    run(again, Squares(6), store, note, warmup_steps=1, decay="linear")
    assert torch.equal(again.values, whole.values) and rates == pytest.approx([0.08, 0.06, 0.04, 0.02])


def test_a_batch_without_a_pair_changes_nothing_and_a_training_of_such_batches_fails() -> None:
    model = Numbers()
    with pytest.raises(
        ValueError, match="3 iterations without an update, since no pair was valid; lower align"
    ):
        run(model, Squares(3, weight=0.0), weight_decay=0.5)
    assert model.values.tolist() == [1.0, -2.0]
    assert model.forwards["policy"] == 3  # that there is no pair is read with all else, after the forward


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
    with pytest.raises(FloatingPointError, match="^align.squares: .* try a lower optimizer.learning_rate"):
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
    with pytest.raises(FloatingPointError, match="update 2: .* in the loss at t=7, prompt 'a star'"):
        run(model, OneBad(3), store, every=1)
    assert store.latest()[0] == 1
    assert torch.equal(model.values.detach(), store.latest()[1]["weights"][0])


def test_a_watch_is_called_at_the_start_and_after_each_iteration_and_can_stop() -> None:
    seen = []

    def watch(iteration, metrics) -> None:
        seen.append((iteration, metrics.get("updates", 0), "loss" in metrics))
        if iteration == 2:
            raise ValueError("enough")

    model = Numbers()
    with pytest.raises(ValueError, match="enough"):
        loop.fit(
            Alignment("align.squares", model, Squares(5)), settings(), checkpoints=None, checkpoint_every=1,
            on_metrics=lambda metrics, step: None, watch=watch,
        )  # fmt: skip
    assert seen == [(0, 0, False), (1, 1, True), (2, 2, True)]


def test_training_ends_before_the_iteration_at_which_it_is_said_and_does_not_go_on_if_resumed(
    tmp_path,
) -> None:
    seen = []
    options = {"checkpoints": CheckpointStore(tmp_path), "checkpoint_every": 2, "ended": lambda: 2 in seen}
    options["on_metrics"] = lambda metrics, iteration: seen.append(iteration)
    for _ in range(2):
        model = Numbers()
        summary = loop.fit(Alignment("align.squares", model, Squares(5)), settings(), **options)
        assert (seen, summary["iterations"], summary["updates"]) == ([1, 2], 2, 2)
    assert model.forwards["policy"] == 0, "the second one computes nothing"


def test_nothing_to_train_is_one_line() -> None:
    model = copy.copy(Numbers())
    model.trainable_parameters = lambda: []
    with pytest.raises(ValueError, match="align.squares: nothing to train"):
        run(model, Squares(1))


def test_where_the_watch_says_so_the_state_is_saved_at_once(tmp_path) -> None:
    store, resumed = CheckpointStore(tmp_path, keep=None), []
    objective = Alignment("align.squares", Numbers(), Squares(5))
    options = {"checkpoints": store, "checkpoint_every": 4, "on_metrics": lambda metrics, iteration: None}
    options |= {"on_resume": resumed.append}
    loop.fit(objective, settings(), watch=lambda iteration, metrics: iteration == 3, **options)
    assert [int(p.stem) for p in sorted(tmp_path.iterdir())] == [3, 4, 5]
    loop.fit(Alignment("align.squares", Numbers(), Squares(6)), settings(), **options)
    assert resumed == [0, 5]


def test_metrics_come_by_iteration_with_the_number_of_updates() -> None:
    """The second of three iterations has no pair."""

    class Gap(Squares):
        def collect(self, backbone, iteration):
            self.weight = float(iteration != 1)
            return super().collect(backbone, iteration)

    seen = []
    run(Numbers(), Gap(3), on_metrics=lambda metrics, iteration: seen.append((iteration, metrics)))
    assert [(i, m["updates"], "loss" in m) for i, m in seen] == [(1, 1, True), (2, 1, False), (3, 2, True)]


def test_outside_the_main_thread_training_is_the_same() -> None:
    """Where no signal comes: a task of Prefect, a callback of Gradio."""
    main, other = Numbers(), Numbers()
    run(main, Squares(3))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, other, Squares(3)).result()["updates"] == 3
    assert torch.equal(main.values, other.values)


def test_every_ema_counts_after_as_many_updates_as_the_default_has() -> None:
    """Sixty: the decay rises with the updates, but no value of the key is out of its reach."""
    ends = set()
    for ema in (0.0, 0.1, 0.5, 0.98, 0.99, 0.9999, 1.0):
        weight = torch.nn.Parameter(torch.zeros(1))
        state = TrainingState([weight], two_numbers.settings(), ema, scale_loss=False)
        for _ in range(60):
            weight.grad = weight.detach() - 1
            state.step(state.gradient_norm())
        state.finish(60)
        ends.add(weight.item())
    assert len(ends) == 7
