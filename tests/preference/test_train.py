import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch

from spo import config
from spo.diffusion.finite import FiniteCheck
from spo.preference import trainer as spm
from spo.preference.model import StepAwarePreferenceModel, token_ids
from spo.preference.step_aware import StepAwareTask
from spo.preference.trainer import NoisedPairs, preference_loss
from spo.training.checkpoint import CheckpointStore
from spo.types import Budget


@dataclass
class GreyPairs:
    """Images of one grey each; the brighter one is preferred."""

    greys: torch.Tensor  # [N,2]
    captions: list[str]
    label_0: torch.Tensor
    weight: torch.Tensor

    def read(self, indices):
        both = self.greys[indices].view(-1, 2, 1, 1, 1).expand(-1, 2, 3, 16, 16)
        return both[:, 0].contiguous(), both[:, 1].contiguous()


@pytest.fixture
def pairs() -> GreyPairs:
    generator = torch.Generator().manual_seed(3)
    greys = torch.rand(60, 2, generator=generator) * 1.6 - 0.8
    label = (greys[:, 0] > greys[:, 1]).float()
    label[:4] = 0.5
    return GreyPairs(greys, ["a square"] * 60, label, torch.ones(60))


@pytest.fixture
def setup(tokenizer, backbone, schedule):
    def made(model, budget: Budget | None = None, **changes) -> StepAwareTask:
        backbone.budget = budget or Budget()
        return StepAwareTask(model, tokenizer, backbone, schedule, settings(**changes))

    return made


def settings(**changes) -> config.Preference:
    optimizer = config.Optimizer(learning_rate=2e-3, weight_decay=0.0)
    return config.Preference(
        **{"init": "x", "optimizer": optimizer, "steps": 60, "batch_size": 16, "guidance": 1.0}
        | {"checkpoint_every": 5}
        | changes
    )


def test_it_learns_what_annotators_prefer(clip, setup, pairs) -> None:
    model = StepAwarePreferenceModel(clip)
    common = (setup(model), pairs)
    spm.train(*common, seed=0)
    report = spm.evaluate(*common, [0, 200], seed=0)
    assert report[0]["n"] == 56  # ties are no clear labels
    assert report[0]["accuracy"] > 0.9
    assert not model.training


def test_accuracy_is_a_share_of_clear_labels(clip, setup, pairs) -> None:
    class Brightness(StepAwarePreferenceModel):
        def encode_image(self, images, timesteps):
            raise AssertionError

        def score_features(self, images, text, timesteps):
            return images.mean((1, 2, 3))

    model = Brightness(clip)
    assert spm.evaluate(setup(model), pairs, [0], seed=0)[0]["accuracy"] > 0.95
    flipped = GreyPairs(pairs.greys, pairs.captions, 1 - pairs.label_0, pairs.weight)
    assert spm.evaluate(setup(model), flipped, [0], seed=0)[0]["accuracy"] < 0.05


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_is_uninterrupted_bit_for_bit(clip, setup, pairs, tmp_path, ema) -> None:
    whole = StepAwarePreferenceModel(copy.deepcopy(clip))
    parts = StepAwarePreferenceModel(copy.deepcopy(clip))
    parts.load_state_dict(whole.state_dict())  # the timestep's embedding is drawn at random
    start = copy.deepcopy(parts.state_dict())
    spm.train(setup(whole, steps=12, ema=ema), pairs, seed=0)

    store = CheckpointStore(tmp_path)

    def stop(metrics, step):
        if step == 8:
            raise KeyboardInterrupt

    options = {"seed": 0, "checkpoint": store}
    with pytest.raises(KeyboardInterrupt):
        spm.train(setup(parts, steps=12, ema=ema), pairs, on_metrics=stop, **options)
    assert store.latest()[0] == 5
    parts.load_state_dict(start)
    spm.train(setup(parts, steps=12, ema=ema), pairs, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_the_saved_weights_are_the_average_of_the_steps(clip, setup, pairs) -> None:
    model, seen = StepAwarePreferenceModel(clip), []

    def keep(metrics, step):
        seen.append(model.model.logit_scale.item())

    spm.train(setup(model, steps=4, ema=0.1), pairs, seed=0, on_metrics=keep)
    by_hand = seen[0]  # decay n / (n + 10) after n updates
    for value, decay in zip(seen[1:], (1 / 11, 2 / 12, 3 / 13), strict=True):
        by_hand = decay * by_hand + (1 - decay) * value
    assert model.model.logit_scale.item() == pytest.approx(by_hand, abs=1e-7)
    assert by_hand != pytest.approx(seen[-1], abs=1e-7)


@pytest.mark.parametrize("changes", [{"pairs": 6}, {"checkpointing": True}])
def test_in_parts_or_computed_again_the_gradients_are_the_same(clip, setup, pairs, changes) -> None:
    """Sixteen pairs in parts of 6, 6 and 4, with unequal weights and ties."""
    pairs.weight[::3] = 0.25
    whole = StepAwarePreferenceModel(clip)
    other, seen, again = copy.deepcopy(whole), [], []
    spm.train(setup(whole, steps=1), pairs, seed=0, on_metrics=lambda m, s: seen.append(m))
    spm.train(
        setup(other, Budget(**changes), steps=1), pairs, seed=0, on_metrics=lambda m, s: again.append(m)
    )
    assert again == [pytest.approx(seen[0], rel=1e-5)]
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (whole, other)]
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()) < 1e-5


def test_a_loss_that_is_not_finite_stops_before_the_update(clip, setup, pairs) -> None:
    model = StepAwarePreferenceModel(clip)
    with torch.no_grad():
        model.model.visual_projection.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"update 1: .* in the loss at t=\d+, prompt 'a square'"):
        spm.train(setup(model), pairs, seed=0)
    assert all(torch.equal(model.state_dict()[k].nan_to_num(7), v.nan_to_num(7)) for k, v in before.items())


def test_pairs_whose_latents_are_not_finite_stop_before_the_update(clip, setup, pairs) -> None:
    model = StepAwarePreferenceModel(clip)
    before = copy.deepcopy(model.state_dict())
    pairs.greys[:] = float("nan")
    with pytest.raises(FloatingPointError, match="update 1: .*stored latents of a pair, prompt 'a square'"):
        spm.train(setup(model), pairs, seed=0)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_no_pairs_is_one_line(clip, setup) -> None:
    empty = GreyPairs(torch.zeros(0, 2), [], torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="no training pairs"):
        model = StepAwarePreferenceModel(clip)
        spm.train(setup(model), empty, seed=0)


def test_heads_alone_leave_the_towers_as_they_are(clip, setup, pairs) -> None:
    model = StepAwarePreferenceModel(clip)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    spm.train(setup(model, trained="heads", steps=3), pairs, seed=0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"model.visual_projection.weight", "model.text_projection.weight", "model.logit_scale"} <= moved
    assert any("adaLN" in n for n in moved)
    towers = ("self_attn", ".mlp.fc", "embeddings", "layer_norm1", "pre_layrnorm")
    assert not [n for n in moved if any(part in n for part in towers)]


def test_at_t_0_the_accuracy_is_on_clean_images(clip, backbone, setup, pairs) -> None:
    """Elsewhere the images are noised; also for a model that was trained on clean images only."""
    noised, plain = [], backbone.predict

    def predict(x_t, timesteps, conditioning, **options):
        noised.append(timesteps.unique().tolist())
        return plain(x_t, timesteps, conditioning, **options)

    backbone.predict = predict
    model = StepAwarePreferenceModel(clip).eval()
    spm.evaluate(setup(model), pairs, [0, 200], seed=0)
    assert noised and all(t == [200] for t in noised)
    indices, captions = torch.arange(4), pairs.captions[:4]
    zeros = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        clean = NoisedPairs(pairs.read(indices), captions, zeros, None)
        inputs = setup(model).inputs(clean, FiniteCheck())
        given = setup(model).scores(inputs, captions, zeros)
        images = torch.cat(pairs.read(indices))
        text = model.encode_text(token_ids(setup(model).tokenizer, captions, model))
        expected = model.score_features(images, text.repeat(2, 1), zeros.repeat(2))
    assert torch.equal(torch.cat(given), expected)


def test_the_loss_by_hand() -> None:
    score_0, score_1 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    label_0 = torch.tensor([1.0, 0.0, 0.5])
    clear = math.log(1 + math.exp(-1))  # both clear pairs are a right guess by a margin of 1
    expected = [clear, clear, 0]
    assert preference_loss(score_0, score_1, label_0).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_a_tie_wants_equal_scores() -> None:
    scores = torch.tensor([0.7], requires_grad=True)
    loss = preference_loss(scores, torch.zeros(1), torch.tensor([0.5]))
    loss.backward()
    assert scores.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(0.7)).item() - 0.5)
    assert loss.item() > 0


def test_on_a_flow_timesteps_are_those_of_its_training_and_no_whole_numbers(clip, setup, pairs, flow) -> None:
    task = replace(setup(StepAwarePreferenceModel(clip)), schedule=flow)
    (((batch,),), _) = spm.LabelObjective(task, pairs, seed=0).collect(0)
    assert batch.timesteps.dtype == torch.float32
    assert set(batch.timesteps.tolist()) <= set(flow.train_timesteps.tolist())
    assert any(t % 1 for t in batch.timesteps.tolist())
    seen = []
    task.model.model.t_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert spm.evaluate(task, pairs, [0, 251], seed=0)[251]["n"] == 56
    assert {t.dtype for t in seen} == {torch.float32} and {t for s in seen for t in s.tolist()} == {
        0.0,
        251.0,
    }
