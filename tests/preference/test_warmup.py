import copy
import math
from dataclasses import dataclass

import pytest
import torch

from spo import config
from spo.preference import pretraining
from spo.preference.degradations import Draws, degrade
from spo.preference.model import StepAwarePreferenceModel, token_ids
from spo.training.checkpoint import CheckpointStore


@dataclass
class PatternPairs:
    """Coloured pictures with an edge. Labels and weights that would break any use of them."""

    greys: torch.Tensor  # [N,2]
    captions: list[str]
    label_0: torch.Tensor
    weight: torch.Tensor

    def read(self, indices):
        edge = torch.where(torch.arange(16) < 8, 0.4, -0.4)
        tint = torch.tensor([0.3, 0.0, -0.3]).view(3, 1, 1)
        both = self.greys[indices].view(-1, 2, 1, 1, 1) + edge + tint
        return both.expand(-1, 2, 3, 16, 16).unbind(1)


@pytest.fixture
def pairs() -> PatternPairs:
    greys = torch.rand(40, 2, generator=torch.Generator().manual_seed(3)) * 0.4 - 0.2
    captions = ["a dark square" if i % 2 else "a bright square" for i in range(40)]
    nothing = torch.full((40,), float("nan"))
    return PatternPairs(greys, captions, nothing, nothing)


def settings(steps: int, **changes) -> config.Degradations:
    optimizer = config.Optimizer(learning_rate=3e-3, weight_decay=0.0)
    told = {"steps": steps, "batch_size": 16, "optimizer": optimizer, "checkpoint_every": 4}
    return config.Degradations(**told | changes)


def order_accuracy(model, tokenizer, pairs) -> float:
    """Of harmed copies that training did not see, by the score for their caption."""
    pictures, n = torch.cat(pairs.read(torch.arange(40))).repeat(5, 1, 1, 1), 400
    first = Draws.of([torch.Generator().manual_seed(i) for i in range(n)], 16)
    second = first.but_one([torch.Generator().manual_seed(1000 + i) for i in range(n)])
    ids = token_ids(tokenizer, pairs.captions * 10, model)
    with torch.no_grad():
        one, other = (
            model.score(degrade(pictures, drawn), ids, torch.zeros(n, dtype=torch.int64))
            for drawn in (first, second)
        )
    return ((one > other) == (first.strengths < second.strengths).any(1)).float().mean().item()


def test_it_learns_to_see_what_harms_a_picture_without_labels(clip, tokenizer, backbone, pairs) -> None:
    torch.manual_seed(0)
    model = StepAwarePreferenceModel(clip)
    before = order_accuracy(model, tokenizer, pairs)
    told = {n: p.clone() for n, p in model.named_parameters() if "adaLN" in n or "t_embedder" in n}
    seen: list[float] = []
    pretraining.warm_up(
        model,
        tokenizer,
        backbone,
        pairs,
        settings(300),
        seed=0,
        on_metrics=lambda m, s: seen.append(m["order"]),
    )
    after = order_accuracy(model, tokenizer, pairs)
    assert before < 0.72 and after > 0.82, (before, after)
    assert sum(seen[-10:]) < 0.8 * sum(seen[:10])
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in told.items())
    assert not model.training


def test_resumed_is_uninterrupted_bit_for_bit(clip, tokenizer, backbone, pairs, tmp_path) -> None:
    whole = StepAwarePreferenceModel(copy.deepcopy(clip))
    parts = StepAwarePreferenceModel(copy.deepcopy(clip))
    parts.load_state_dict(whole.state_dict())
    start = copy.deepcopy(parts.state_dict())
    common = (tokenizer, backbone, pairs, settings(9))
    pretraining.warm_up(whole, *common, seed=0)

    def stop(metrics, step):
        if step == 6:
            raise KeyboardInterrupt

    store = CheckpointStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretraining.warm_up(parts, *common, seed=0, checkpoint=store, on_metrics=stop)
    assert store.latest()[0] == 4
    for _ in range(2):  # the second time nothing is left to do
        parts.load_state_dict(start)
        pretraining.warm_up(parts, *common, seed=0, checkpoint=store)
        for name, value in whole.state_dict().items():
            assert torch.equal(parts.state_dict()[name], value), name


def test_the_loss_of_an_order_by_hand() -> None:
    gap, difference = torch.tensor([2.0, -1.0, 5.0, 0.5]), torch.tensor([-0.3, -0.2, 0.0, 0.1])
    by_hand = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), 0.0, math.log1p(math.exp(0.5))]
    assert pretraining.order_loss(gap, difference).tolist() == pytest.approx(by_hand)


def test_a_loss_that_is_not_finite_stops_before_the_update(clip, tokenizer, backbone, pairs) -> None:
    model = StepAwarePreferenceModel(clip)
    with torch.no_grad():
        model.model.visual_projection.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"preference\.degradations: gradient norm nan at step 0"):
        pretraining.warm_up(model, tokenizer, backbone, pairs, settings(2), seed=0)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name].nan_to_num(7), value.nan_to_num(7)), name


def test_no_pairs_is_one_line(clip, tokenizer, backbone) -> None:
    nothing = torch.zeros(0)
    empty = PatternPairs(torch.zeros(0, 2), [], nothing, nothing)
    with pytest.raises(ValueError, match="no training pairs"):
        pretraining.warm_up(StepAwarePreferenceModel(clip), tokenizer, backbone, empty, settings(2), seed=0)


def test_pictures_are_kept_at_the_size_that_the_model_sees(clip, backbone, pairs, monkeypatch) -> None:
    monkeypatch.setattr(backbone, "decode", lambda x: x.repeat_interleave(4, -1).repeat_interleave(3, -2))
    pictures, captions = pretraining._pictures(StepAwarePreferenceModel(clip), backbone, pairs, 7, seed=0)
    assert pictures.shape == (7, 3, 16, 16) and pictures.dtype == torch.uint8 and len(captions) == 7
    assert (pictures[..., 2].float() - pictures[..., -3].float()).abs().min() > 50  # the edge is still there
