"""Quality against compute: points by hand, and when there are none."""

import pandas as pd
import pytest

from spo.evaluation.efficiency import course

CURVE = pd.DataFrame(
    {
        "step": [0, 3, 5, 10],
        "loss": [None, 0.7, 0.6, 0.5],
        "validation/gain": [0.0, None, 1.5, 1.0],
        "validation/oracle_aesthetic": [0.5, None, 0.7, 0.6],
    }
)
TRAINED = {"training_seconds": 40.0, "unet_samples": 1000, "iterations": 10, "selected_iteration": 5}


def test_the_models_trained_first_come_before_and_compute_grows_evenly() -> None:
    first = [{"training_seconds": 30.0, "unet_samples": 200}]
    column, points = course(CURVE, TRAINED, first)
    assert column == "validation/oracle_aesthetic"
    assert points.seconds == pytest.approx([30, 50, 70])
    assert points.unet_samples == pytest.approx([200, 700, 1200])
    assert points.quality == [0.5, 0.7, 0.6] and points.selected == 1


def test_without_an_oracle_the_gain_is_shown_and_without_a_selection_no_star() -> None:
    column, points = course(
        CURVE.drop(columns="validation/oracle_aesthetic"), {**TRAINED, "selected_iteration": None}, []
    )
    assert column == "validation/gain" and points.quality == [0.0, 1.5, 1.0] and points.selected is None


@pytest.mark.parametrize(
    ("curve", "trained", "first"),
    [
        (CURVE[["step", "loss"]], TRAINED, []),
        (CURVE, {"iterations": 10}, []),
        (CURVE, TRAINED, [{}]),  # the preference model's compute is unknown
    ],
)
def test_what_was_not_measured_is_not_shown(curve, trained, first) -> None:
    assert course(curve, trained, first) is None
