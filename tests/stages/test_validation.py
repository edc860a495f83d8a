"""Validation during training, and the limits that stop it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from spo.config import Validation
from spo.evaluation import validation
from spo.evaluation.validation import Collapse, Watch


class Curve:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class Trained:
    """Stands for the model: its scores and diversity by look, and the folders that it was written to."""

    def __init__(self, *looks: tuple[list[float], float]) -> None:
        self.looks, self.asked, self.kept = list(looks), 0, 0

    def judge(self) -> tuple[dict[str, list[float]], float, Image.Image]:
        scores, diversity = self.looks[self.asked]
        self.asked += 1
        return {"hps": scores}, diversity, Image.new("RGB", (8, 8), (self.asked, 0, 0))

    def keep(self, folder: Path) -> None:
        folder.mkdir()
        self.kept += 1
        (folder / "model").write_text(str(self.asked))


def watch(tmp_path: Path, model: Trained, iterations: int = 5, **limits: float) -> tuple[Watch, Curve]:
    settings, curve = Validation(every=2, prompts=2, **limits), Curve()
    return Watch(settings, model.judge, model.keep, curve, tmp_path, "align.spo", iterations), curve


GOOD = ([1.0, 2.0], 0.4)


def test_it_looks_before_every_few_iterations_and_after_the_last(tmp_path: Path) -> None:
    model = Trained(GOOD, ([2.0, 3.0], 0.3), ([2.0, 5.0], 0.2), ([3.0, 5.0], 0.2))
    seen, curve = watch(tmp_path, model)
    for iteration in range(6):
        seen(iteration, {"loss": 1.0}, 10 * iteration)
    assert [step for step, _ in curve.rows] == [0, 20, 40, 50]
    assert curve.rows[1][1] == {"validation/hps": 2.5, "validation/diversity": 0.3}
    samples = sorted((tmp_path / "samples").glob("*.png"))
    assert [p.stem for p in samples] == ["000000", "000020", "000040", "000050"]
    assert (tmp_path / "good/model").read_text() == "3"  # that of iteration 4; the last is the stage's own
    assert model.kept == 2


@pytest.mark.parametrize(
    ("bad", "limits", "why"),
    [
        # differences -4 and -6: mean -5, standard deviation sqrt 2, standard error 1
        (([-3.0, -4.0], 0.4), {"max_fall": 4.9}, r"hps of validation prompts fell by 5, more than 4.9"),
        (
            ([1.0, 2.0], 0.19),
            {"min_diversity": 0.5},
            r"diversity fell from 0.4 to 0.19 \(min_diversity 0.5\)",
        ),
    ],
)
def test_a_collapse_stops_and_names_the_last_good_model(tmp_path: Path, bad, limits, why: str) -> None:
    seen, curve = watch(tmp_path, Trained(GOOD, GOOD, bad), **limits)
    seen(0, {}, 0)
    seen(2, {}, 2)
    with pytest.raises(Collapse, match=rf"align.spo: stopped at iteration 4: {why}.* iteration 2, in .*good"):
        seen(4, {}, 4)
    assert curve.rows[-1][0] == 4, "what was seen is logged before it stops"
    assert json.loads((tmp_path / "good/iteration.json").read_text()) == 2
    milder = {name: value + 0.2 if name == "max_fall" else value - 0.1 for name, value in limits.items()}
    seen, _ = watch(tmp_path / "again", Trained(GOOD, GOOD, bad), **milder)
    for iteration in (0, 2, 4):
        seen(iteration, {}, iteration)


@pytest.mark.parametrize("name", ["kl", "output_distance"])
def test_divergence_is_watched_at_every_iteration(tmp_path: Path, name: str) -> None:
    seen, _ = watch(tmp_path, Trained(GOOD), max_divergence=2.0)
    seen(0, {}, 0)
    seen(1, {name: 1.9}, 1)
    with pytest.raises(
        Collapse, match=f"iteration 3: {name} to the reference is 2.5 .max_divergence 2.; .*none"
    ):
        seen(3, {name: 2.5}, 3)


def test_a_resumed_stage_compares_with_its_own_start(tmp_path: Path) -> None:
    seen, _ = watch(tmp_path, Trained(GOOD, GOOD), max_fall=1.0)
    seen(0, {}, 0)
    again, _ = watch(tmp_path, Trained(([-3.0, -4.0], 0.4)), max_fall=1.0)
    with pytest.raises(Collapse, match="hps"):
        again(2, {}, 2)


def test_diversity_is_one_minus_the_mean_cosine_of_images_of_a_prompt() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert validation.diversity(torch.stack([torch.stack([east, east])])) == pytest.approx(0)
    assert validation.diversity(torch.stack([torch.stack([east, north])])) == pytest.approx(1)
    # three images: cosines 1, 0 and 0 of three pairs; and a prompt whose images are equal
    one = torch.stack([east, east, north])
    assert validation.diversity(torch.stack([one, torch.stack([north] * 3)])) == pytest.approx(
        (2 / 3 + 0) / 2
    )
