"""Quality against compute: points by hand, and when there are none."""

import pandas as pd
import pytest

from spo.evaluation.efficiency import points

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
    found = points(CURVE, TRAINED, first)
    assert found["training_seconds"].tolist() == pytest.approx([30, 50, 70])
    assert found["unet_samples"].tolist() == pytest.approx([200, 700, 1200])
    assert found["validation/oracle_aesthetic"].tolist() == [0.5, 0.7, 0.6]
    assert found["selected"].tolist() == [False, True, False]


def test_without_an_oracle_the_gain_is_shown_and_without_a_selection_no_star() -> None:
    trained = {**TRAINED, "selected_iteration": None}
    found = points(CURVE.drop(columns="validation/oracle_aesthetic"), trained, [])
    assert found["validation/gain"].tolist() == [0.0, 1.5, 1.0] and not found["selected"].any()


@pytest.mark.parametrize(
    ("curve", "trained", "first"),
    [
        (CURVE[["step", "loss"]], TRAINED, []),
        (CURVE, {"iterations": 10}, []),
        (CURVE, TRAINED, [{}]),  # the preference model's compute is unknown
    ],
)
def test_what_was_not_measured_is_not_shown(curve, trained, first) -> None:
    assert points(curve, trained, first) is None
