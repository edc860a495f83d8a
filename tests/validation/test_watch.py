"""Validation while a method trains: when it happens, what stops the training, which weights are selected."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from group import run_in
from PIL import Image

from spo.config import Validation
from spo.training import distributed
from spo.validation import limits
from spo.validation.images import Validated, diversity
from spo.validation.watch import Collapse, Watch


class Curve:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class Trained:
    """Stands for the model: its scores and diversity at each validation, and the folders it was saved to."""

    def __init__(self, *validations: tuple[list[float], float]) -> None:
        self.validations, self.asked, self.saved = list(validations), 0, 0

    def validate(self) -> Validated:
        scores, diversity = self.validations[self.asked]
        self.asked += 1
        row = Image.new("RGB", (8, 8), (self.asked, 0, 0))
        return Validated({"hps": scores}, {"oracle_aesthetic": 0.5}, diversity, row)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        self.saved += 1
        (folder / "model").write_text(str(self.asked))


def watch(tmp_path: Path, model: Trained, iterations: int = 5, **limits) -> tuple[Watch, Curve]:
    settings, curve = Validation(every=2, prompts=2, **limits), Curve()
    callback = Watch(
        settings=settings,
        validate=model.validate,
        save=model.save,
        curve=curve,
        scratch=tmp_path,
        name="align.spo",
        iterations=iterations,
        divergence="kl",
    )
    return callback, curve


GOOD = ([1.0, 2.0], 0.4)


def test_it_validates_before_every_few_iterations_and_after_the_last(tmp_path: Path) -> None:
    model = Trained(GOOD, ([2.0, 3.0], 0.3), ([2.0, 5.0], 0.2), ([3.0, 5.0], 0.2))
    callback, curve = watch(tmp_path, model)
    validated = [callback(iteration, {"loss": 1.0}) for iteration in range(6)]
    assert validated == [True, False, True, False, True, True]
    assert [step for step, _ in curve.rows] == [0, 2, 4, 5]
    assert curve.rows[1][1] == {
        "validation/hps": 2.5,
        "validation/oracle_aesthetic": 0.5,
        "validation/diversity": 0.3,
    }
    samples = sorted((tmp_path / "samples").glob("*.png"))
    assert [p.stem for p in samples] == ["000000", "000002", "000004", "000005"]
    assert (tmp_path / "good/00000004/model").read_text() == "3"  # of iteration 4; the stage saves the last
    assert model.saved == 2 and callback.selected() is None


def test_the_best_validation_by_the_named_scorers_is_selected(tmp_path: Path) -> None:
    """Gains of 1, 3 and 2 in scores whose standard deviation at the start is sqrt(.5)."""
    model = Trained(GOOD, ([2.0, 3.0], 0.4), ([4.0, 5.0], 0.4), ([3.0, 4.0], 0.4))
    callback, curve = watch(tmp_path, model, select=("hps",))
    for iteration in range(6):
        callback(iteration, {})
    gains = [row["validation/gain"] for _, row in curve.rows]
    assert gains == pytest.approx([g / 0.5**0.5 for g in (0, 1, 3, 2)])
    assert callback.selected() == {"iteration": 4, "gain": pytest.approx(3 / 0.5**0.5)}
    assert (tmp_path / "best/00000004/model").read_text() == "3"


def test_a_selection_names_a_scorer() -> None:
    with pytest.raises(ValueError, match="select"):
        Validation(every=2, select=())
    with pytest.raises(ValueError, match="select"):
        Validation(every=2, select=("oracle",))


def test_a_resumed_stage_knows_the_best_so_far_and_has_every_image(tmp_path: Path) -> None:
    first, _ = watch(tmp_path, Trained(GOOD, ([4.0, 5.0], 0.4)), select=("hps",))
    first(0, {})
    first(2, {})
    again, _ = watch(tmp_path, Trained(*3 * [([2.0, 3.0], 0.4)]), select=("hps",))
    again.resume(3)
    again(4, {})
    assert again.selected()["iteration"] == 2
    assert sorted(path.stem for path in again.samples.glob("*.png")) == ["000000", "000002", "000004"]


@pytest.mark.parametrize("killed", ["before the state was saved", "later"])
def test_what_was_validated_after_the_checkpoint_counts_no_more(tmp_path: Path, killed: str) -> None:
    """Gains 1, then 2 in the part that is lost; the part that replaces it has 0 there.

    Killed later: the state after iteration 4 was saved, and is damaged.
    """
    options = {"iterations": 9, "select": ("hps",)}
    first, _ = watch(tmp_path, Trained(GOOD, ([2.0, 3.0], 0.4), ([3.0, 4.0], 0.4)), **options)
    for iteration in range(5 if killed == "before the state was saved" else 6):
        first(iteration, {})
    assert first.selected()["iteration"] == 4
    again, _ = watch(tmp_path, Trained(GOOD), **options)
    again.resume(3)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000.png", "000002.png"]
    again(4, {})
    if killed == "before the state was saved":
        assert again.selected()["iteration"] == 2
        assert (tmp_path / "best/00000002/model").read_text() == "2"
    else:
        assert again.selected() == {"iteration": 4, "gain": 0.0}
    assert json.loads((tmp_path / "good/00000004/validation.json").read_text()) == {"iteration": 4}


def test_the_main_process_decides_and_the_others_follow(tmp_path: Path) -> None:
    """The other process sees another folder: no start, no saved model, other scores."""

    def body() -> str:
        main = distributed.is_main_process()
        folder = tmp_path / ("shared" if main else "another")
        bad = ([-3.0, -4.0], 0.4) if main else GOOD
        callback, _ = watch(folder, Trained(GOOD, GOOD, bad), max_fall=4.9, max_divergence=1.0)
        callback(0, {"kl": 0.0})
        callback(2, {"kl": 0.0})
        again, _ = watch(folder, Trained(bad), max_fall=4.9, max_divergence=1.0)
        again.resume(2)
        try:
            again(4, {"kl": 0.0})
        except Collapse as collapse:
            return str(collapse)
        return "went on"

    first, second = run_in(2, body)
    assert first == second and "iteration 4: hps" in first and "last good model: iteration 2" in first
    assert not (tmp_path / "another").exists(), "the other process writes nothing"


def test_the_gain_does_not_depend_on_a_scorers_units() -> None:
    start = {"hps": [20.0, 22.0, 24.0], "aesthetic": [5.0, 5.5, 6.0]}
    now = {"hps": [22.0, 24.0, 26.0], "aesthetic": [4.0, 4.5, 5.0]}
    # +2 at a standard deviation of 2, -1 at .5
    assert limits.standardised_gain(start, now, ["hps"]) == pytest.approx(1)
    assert limits.standardised_gain(start, now, ["hps", "aesthetic"]) == pytest.approx((1 - 2) / 2)
    assert limits.standardised_gain({"hps": [1.0, 1.0]}, {"hps": [2.0, 2.0]}, ["hps"]) == 0


START = {"hps": [1.0, 2.0], "pickscore": [3.0, 5.0]}  # standard deviations sqrt .5 and sqrt 2


@pytest.mark.parametrize(
    ("later", "why"),
    [
        ([{"hps": [2.0, 3.0], "pickscore": [3.0, 5.0]}], None),
        ([{"hps": [1.0, 2.0], "pickscore": [3.0, 5.0]}], "the gain, 0.000, is not above"),
        # gains .707 and .636, whatever came between
        ([{"hps": [2.0, 3.0], "pickscore": [3, 5]}, {"hps": [1.9, 2.9], "pickscore": [3, 5]}], "the gain"),
        # pickscore's best is the first of these; differences -.2 and -.4: mean -.3, standard error .1
        ([{"hps": [2.0, 3.0], "pickscore": [4.0, 6.0]}, {"hps": [9.0, 9.0], "pickscore": [3.8, 5.6]}],
         r"pickscore is 0.3 below its best, more than a standard error of 0.1"),
        # differences -.2 and .1: mean -.05, standard error .15
        ([{"hps": [2.0, 3.0], "pickscore": [4.0, 6.0]}, {"hps": [9.0, 9.0], "pickscore": [3.8, 6.1]}], None),
    ],
)  # fmt: skip
def test_a_training_ends_when_the_gain_or_one_scorer_falls_behind_its_best(later, why: str | None) -> None:
    reason = limits.no_better([START, *later], ["hps", "pickscore"])
    assert reason is None if why is None else re.match(why, reason)


def test_clipscore_may_fall_by_standard_deviations_of_its_start() -> None:
    start, now = {"clipscore": [1.0, 2.0]}, {"clipscore": [0.5, 1.5]}  # by .5 / sqrt .5 = .707
    assert limits.clipscore_fell(start, now, 0.71) is None and limits.clipscore_fell(start, now, None) is None
    assert re.match(
        r"clipscore fell by 0.71 .*max_clipscore_fall 0.7", limits.clipscore_fell(start, now, 0.7)
    )


def test_an_ended_training_has_the_weights_of_the_validation_before_also_if_resumed(tmp_path: Path) -> None:
    model = Trained(GOOD, ([2.0, 3.0], 0.4), ([1.5, 2.5], 0.4))
    callback, curve = watch(tmp_path, model, iterations=9, select=("hps",), stop=True)
    for iteration in range(4):
        callback(iteration, {})
        assert callback.ended is None
    assert callback(4, {}) and "the gain, 0.707, is not above the best before, 1.414" in callback.ended
    assert callback.selected()["iteration"] == 2 and [step for step, _ in curve.rows] == [0, 2, 4]
    again, _ = watch(tmp_path, Trained(), iterations=9, select=("hps",), stop=True)
    again.resume(4)
    assert again.ended == callback.ended
    again.resume(3)
    assert again.ended is None, "the validation that ended it counts no more"


def test_a_gain_for_which_one_scorer_paid_is_not_selected(tmp_path: Path) -> None:
    model = Trained(GOOD, ([2.0, 3.0], 0.4), ([3.0, 4.0], 0.4))
    callback, _ = watch(tmp_path, model, select=("hps",), max_clipscore_fall=0.5, max_fall=6.0)
    clipscores = iter(([0.5, 1.0], [0.5, 1.0], [0.3, 0.8]))  # the last .2 lower, standard deviation .354
    validate = model.validate

    def validated() -> Validated:
        now = validate()
        return replace(now, scores={**now.scores, "clipscore": next(clipscores)})

    callback.validate = validated
    for iteration in range(5):
        callback(iteration, {})
    assert callback.ended and callback.selected()["iteration"] == 2


def test_all_processes_end_together(tmp_path: Path) -> None:
    def body() -> list[str | None]:
        folder, ended = tmp_path / str(distributed.is_main_process()), []
        callback, _ = watch(folder, Trained(GOOD, GOOD), select=("hps",), stop=True)
        for iteration in (0, 2):
            callback(iteration, {})
            ended.append(callback.ended)
        callback.ended = None
        callback.resume(2)
        return [*ended, callback.ended]

    first, second = run_in(2, body)
    assert first == second and first[0] is None and first[1] == first[2] and "not above" in first[1]


def test_what_ends_a_training_needs_the_scorers_that_select() -> None:
    for limit in ({"stop": True}, {"max_clipscore_fall": 0.2}):
        with pytest.raises(ValueError, match="need `select`"):
            Validation(every=2, **limit)


@pytest.mark.parametrize(
    ("bad", "limits", "why"),
    [
        # differences -4 and -6: mean -5, standard deviation sqrt 2, standard error 1
        (([-3.0, -4.0], 0.4), {"max_fall": 4.9}, r"hps of validation prompts fell by 5, more than 4.9"),
        (
            ([1.0, 2.0], 0.19),
            {"min_diversity": 0.5},
            r"diversity fell from 0.4 to 0.19 \(min_",
        ),
    ],
)
def test_a_collapse_stops_and_names_the_last_good_model(tmp_path: Path, bad, limits, why: str) -> None:
    callback, curve = watch(tmp_path, Trained(GOOD, GOOD, bad), **limits)
    callback(0, {})
    callback(2, {})
    with pytest.raises(Collapse, match=rf"align.spo: stopped at iteration 4: {why}.* iteration 2, in .*good"):
        callback(4, {})
    assert curve.rows[-1][0] == 4, "the scores are logged before it stops"
    assert json.loads((tmp_path / "good/00000002/validation.json").read_text()) == {"iteration": 2}
    milder = {name: value + 0.2 if name == "max_fall" else value - 0.1 for name, value in limits.items()}
    callback, _ = watch(tmp_path / "again", Trained(GOOD, GOOD, bad), **milder)
    for iteration in (0, 2, 4):
        callback(iteration, {})


def test_divergence_is_checked_at_every_iteration(tmp_path: Path) -> None:
    callback, _ = watch(tmp_path, Trained(GOOD), max_divergence=2.0)
    callback(0, {})
    callback(1, {"kl": 1.9, "output_distance": 9.0})
    with pytest.raises(Collapse, match="iteration 3: kl to the reference is 2.5 .max_divergence 2.; .*none"):
        callback(3, {"kl": 2.5})


def test_a_resumed_stage_compares_with_its_own_start(tmp_path: Path) -> None:
    callback, _ = watch(tmp_path, Trained(GOOD, GOOD), max_fall=1.0)
    callback(0, {})
    again, _ = watch(tmp_path, Trained(([-3.0, -4.0], 0.4)), max_fall=1.0)
    with pytest.raises(Collapse, match="hps"):
        again(2, {})


def test_diversity_is_one_minus_the_mean_cosine_of_images_of_a_prompt() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert diversity(torch.stack([torch.stack([east, east])])) == pytest.approx(0)
    assert diversity(torch.stack([torch.stack([east, north])])) == pytest.approx(1)
    # three images: cosines 1, 0 and 0 of three pairs; and a prompt whose images are the same
    one = torch.stack([east, east, north])
    assert diversity(torch.stack([one, torch.stack([north] * 3)])) == pytest.approx((2 / 3 + 0) / 2)
