"""What would fail after hours is refused at once, in one line with key, value and bound."""

import copy
from functools import cache
from typing import Any

import pytest
import yaml

from spo import config
from spo.stages import inputs


@cache
def scenes() -> dict[str, Any]:
    return yaml.safe_load(config.preset("scenes"))


def with_values(values: dict[str, Any]) -> dict[str, Any]:
    """The preset's params, changed by dotted key."""
    raw = copy.deepcopy(scenes())
    for key, value in values.items():
        *path, last = key.split(".")
        section = raw
        for part in path:
            section = section[part]
        section[last] = value
    return raw


def numbers(schema: Any, where: str = "") -> dict[str, dict[str, Any]]:
    """Every number in a JSON schema, by its place."""
    if isinstance(schema, list):
        return {k: v for i, part in enumerate(schema) for k, v in numbers(part, f"{where}.{i}").items()}
    if not isinstance(schema, dict):
        return {}
    found = {where: schema} if schema.get("type") in ("integer", "number") else {}
    return found | {
        k: v for name, part in schema.items() for k, v in numbers(part, f"{where}.{name}").items()
    }


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    found = numbers(config.Params.model_json_schema())
    assert len(found) > 80
    for where, schema in found.items():
        for least, most in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            assert schema.keys() & {least, most}, f"{where}: no {least}"


SAMPLERS = ("align.spo", "align.lpo")
OPTIMIZERS = ("preference", "latent_preference", "align.spo", "align.diffusion_dpo", "align.lpo")
OUTSIDE = {
    **{f"{s}.eta": (1.5, 0.0, -0.1) for s in SAMPLERS},
    **{f"{s}.clip": (1.0, 0.0, 2.0) for s in SAMPLERS},
    **{f"{s}.threshold": (1.0, -0.1) for s in SAMPLERS},
    **{f"{s}.threshold_end": (1.0,) for s in SAMPLERS},
    **{f"{s}.divert_start_step": (20, -1) for s in SAMPLERS},
    **{f"{s}.guidance": (101.0, -1.0) for s in (*SAMPLERS, "preference", "generate.base", "generate.spo")},
    **{f"{s}.optimizer.beta1": (1.0, -0.1) for s in OPTIMIZERS},
    **{f"{s}.optimizer.beta2": (1.0,) for s in OPTIMIZERS},
    **{f"{s}.optimizer.epsilon": (0.0, 1e-50) for s in OPTIMIZERS},
    **{f"{s}.optimizer.learning_rate": (0.0, 1e6) for s in OPTIMIZERS},
    "generate.eta": (1.5, -0.1),
    "preference.ema": (1.1, -0.1),
    "preference.steps": (0, 2**31, 10**400),
    "pairs.validation_fraction": (0.0, 1.0),
    "prompts.max_tokens": (2, 78),
    "report.bootstrap_samples": (1, 10**9),
    "report.baselines": ([], ["bse"]),
    "align.spo.gradspo": ({"sampler_ema": 1.0},),
    "align.spo.lora.target_modules": ([],),
}


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, values in OUTSIDE.items() for v in values])
def test_a_value_outside_its_range_is_one_line_with_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.validate(with_values({key: value}))
    message, named = str(error.value), key.rsplit(".", 1)
    assert "\n" not in message and named[0] in message and named[1] in message
    assert str(value)[:20].strip("[]'{}") in message.replace("()", "") or value == {"sampler_ema": 1.0}


@pytest.mark.parametrize("section", OPTIMIZERS)
def test_a_training_that_ends_before_its_rate_decays_is_refused(section: str) -> None:
    length = "steps" if "preference" in section else "iterations"
    changes = {f"{section}.{length}": 5, f"{section}.optimizer.warmup_steps": 4}
    with_decay = changes | {f"{section}.optimizer.decay": "linear"}
    config.validate(with_values(with_decay))
    with pytest.raises(config.ConfigError, match=f"{section}.*optimizer.decay: linear never begins") as error:
        config.validate(with_values(with_decay | {f"{section}.{length}": 4}))
    assert "\n" not in str(error.value)
    config.validate(with_values(changes | {f"{section}.{length}": 4}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_may_be_nan_or_infinite(value: float) -> None:
    raw = config.validate(with_values({})).model_dump(mode="json")
    keys = [k for k, v in flat(raw).items() if isinstance(v, float | int) and not isinstance(v, bool)]
    assert len(keys) > 90
    for key in keys:
        with pytest.raises(config.ConfigError, match=key.replace(".", r"\.")):
            config.validate(with_values({key: value}))


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"preference.local_prompts": 97},
            "preference.local_prompts: 97 is more than the 96 of prompts.n_val",
        ),
        ({"prompts.n_validation": 15}, "local_prompts: 16 is more than the 15 of prompts.n_validation"),
        (
            {"align.lpo.validation.prompts": 97},
            "align.lpo.validation.prompts: 97 is more than the 96 of prompts.n_validation",
        ),
        ({"processes": 9}, "align.spo.prompts_per_iteration: 8 is less than the 9 of processes"),
        ({"processes": 2, "preference.batch_size": 1}, "preference.batch_size: 1 is less than the 2"),
        ({"processes": 2, "align.diffusion_dpo.batch_size": 1}, "align.diffusion_dpo.batch_size: 1 is less"),
        (
            {"align.spo.optimizer.learning_rate": 0.5, "align.spo.optimizer.weight_decay": 2.0},
            "align.spo.optimizer: weight_decay 2 times learning_rate 0.5 is not below 1",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.validate(with_values(values))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generate.num_inference_steps": 2000}, "generate: num_inference_steps is 2000; .* 1 to 1000"),
        ({"preference.eval_timesteps": [0, 1000]}, "preference.eval_timesteps: 1000 is above 999"),
        ({"latent_preference.eval_timesteps": [2000]}, "latent_preference.eval_timesteps: 2000 is above 999"),
        ({"align.spo.timestep_range": [996, 999]}, "align.spo.divert_start_step: .*within timestep_range"),
        ({"align.lpo.timestep_range": [1000, 2000]}, "align.lpo.divert_start_step: .*within timestep_range"),
        ({"score.oracle": None}, "preference.local_prompts: needs score.oracle"),
    ],
)
def test_the_first_stage_refuses_what_the_base_or_the_scorers_lack(tmp_path, values, message: str) -> None:
    (tmp_path / "base/scheduler").mkdir(parents=True)
    (tmp_path / "base/scheduler/scheduler_config.json").write_text(
        '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}'
    )
    base = {"backbone.checkpoint": str(tmp_path / "base")}
    inputs.check_before_training(config.validate(with_values(base)))
    with pytest.raises(ValueError, match=message) as error:
        inputs.check_before_training(config.validate(with_values(base | values)))
    assert "\n" not in str(error.value)
