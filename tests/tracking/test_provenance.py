"""The parameters that a stage's run logs."""

import pytest

from spo.tracking.provenance import section

PARAMS = {
    "seed": 3,
    "preference": {"steps": 5, "step_condition": True, "noised": True},
    "latent_preference": {"steps": 7},
    "align": {"beta": 1, "spo": {"k": 4}, "lpo": {"k": 2}},
}


@pytest.mark.parametrize(
    ("stage", "item", "logged"),
    [
        (
            "preference",
            None,
            {"preference.steps": 5, "preference.step_condition": True, "preference.noised": True},
        ),
        ("preference", "latent", {"latent_preference.steps": 7}),
        (
            *("preference", "clean_only"),
            {"preference.steps": 5, "preference.step_condition": False, "preference.noised": False},
        ),
        ("align", "spo", {"align.beta": 1, "align.spo.k": 4}),
        ("inputs", None, {}),
    ],
)
def test_a_stage_logs_what_it_was_made_with(stage: str, item: str | None, logged: dict) -> None:
    assert section(PARAMS, stage, item) == {"seed": 3, **logged}
    assert PARAMS["preference"]["step_condition"] is True, "params are left as they were"
