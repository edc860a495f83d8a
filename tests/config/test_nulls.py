"""Sections and sources that are null: methods, variants, pairs and training prompts that nothing needs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import yaml

from spo import config

METHODS = ("spo", "diffusion_dpo", "lpo")
RELEASED = {f"align.{method}.pretrained": "own/released@main" for method in METHODS}
NO_PAIRS: dict[str, Any] = {
    "pairs.source": None,
    "prompts.pairs": None,
    "prompts.train": None,
    "prompts.n_train": 0,
}


def validate(values: dict[str, Any]) -> config.Params:
    raw = yaml.safe_load(config.preset("scenes"))
    for key, value in values.items():
        *path, last = key.split(".")
        functools.reduce(lambda inner, name: inner[name], path, raw)[last] = value
    return config.validate(raw)


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(config.ConfigError) as error:
        validate(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["spo", "diffusion_dpo", "lpo", "base_high_guidance", "diffusion_dpo_high_guidance"]
)
def test_what_is_set_to_null_is_named_nowhere(name: str) -> None:
    """A method takes its variant with it; neither may be a baseline, or what is registered."""
    out = {f"align.{name}": None, f"generate.{name}": None} if name in METHODS else {f"generate.{name}": None}
    rest = {"report.baselines": ["base"], "registry.method": "lpo" if name == "spo" else "spo"}
    params = validate({**out, **rest})
    assert name not in params.generate.variants() and name not in params.align.trained()
    for key in out if len(out) == 2 else ():
        other = next(k for k in out if k != key)
        assert f"{key}: is null, but {other} is not" in refused({key: None, **rest})
    assert f"report.baselines: {name!r} is null" in refused({**out, **rest, "report.baselines": [name]})
    assert f"registry.baseline: {name!r} is null" in refused({**out, **rest, "registry.baseline": name})


def test_a_null_method_is_not_registered_and_lends_no_weights() -> None:
    out = {"align.spo": None, "generate.spo": None}
    assert "registry.method: 'spo' is null" in refused(out)
    weights = {"adapter": "outputs/align/diffusion_dpo", "guidance": 1.0}
    out = {"align.diffusion_dpo": None, "generate.diffusion_dpo": None, "report.baselines": ["base"]}
    line = refused({**out, "generate.diffusion_dpo_high_guidance": weights})
    assert "generate.diffusion_dpo_high_guidance.adapter: align.diffusion_dpo is null" in line


def test_pairs_and_training_prompts_may_be_null_where_nothing_is_trained_on_them() -> None:
    params = validate({**RELEASED, **NO_PAIRS})
    assert not params.wants("preference") and not params.wants("latent_preference")
    assert not params.trains("pairs") and params.align.trained() == {}


@pytest.mark.parametrize(
    ("trained", "line"),
    [
        ("diffusion_dpo", "pairs.source: is null, but align.diffusion_dpo is trained on pairs"),
        ("spo", "pairs.source: is null, but preference is trained on pairs"),
        ("lpo", "pairs.source: is null, but latent_preference is trained on pairs"),
    ],
)
def test_pairs_that_are_needed_are_asked_for(trained: str, line: str) -> None:
    message = refused({**RELEASED, f"align.{trained}.pretrained": None, "pairs.source": None})
    assert line in message and ".pretrained" in message


def test_spo_from_a_released_preference_model_needs_prompts_and_no_pairs() -> None:
    spo = {**RELEASED, "align.spo.pretrained": None, "preference.pretrained": "own/spm"}
    params = validate({**spo, "pairs.source": None})
    assert params.wants("preference") and not params.trains_model("preference")
    for nothing in ({"prompts.train": None}, {"prompts.n_train": 0}):
        assert "prompts.train, prompts.n_train: align.spo is trained on prompts" in refused(
            {**spo, **nothing}
        )


def test_a_released_preference_model_is_wanted_where_pairs_can_measure_it() -> None:
    measured = {**RELEASED, "preference.pretrained": "own/spm"}
    assert validate(measured).wants("preference") and not validate(RELEASED).wants("preference")
    assert not validate({**measured, **NO_PAIRS}).wants("preference")
