import copy
import json

import pytest
import yaml

from spo import config


@pytest.fixture(scope="module")
def scenes() -> dict:
    return yaml.safe_load(config.preset("scenes"))


@pytest.fixture
def raw(scenes) -> dict:
    return copy.deepcopy(scenes)


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_is_valid(name: str) -> None:
    params = config.validate(yaml.safe_load(config.preset(name)))
    assert params.name == name


def leaves(section: dict, prefix: str = "") -> dict:
    """{dotted key: value}; everything but a section with keys is a leaf."""
    values = {}
    for name, value in section.items():
        values |= (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        )
    return values


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_holds_every_key_in_the_order_of_the_sections(name: str) -> None:
    """`dvc exp run -S` changes only keys that the file has."""
    written = yaml.safe_load(config.preset(name))
    resolved = leaves(config.validate(written).model_dump(mode="json"))
    assert leaves(written) == resolved and list(leaves(written)) == list(resolved)
    assert len(resolved) >= 140
    assert config.code_defaults(config.validate(written)) == {}


# of the files with every key, and two of those that are based on them
@pytest.mark.parametrize(
    "name", ["scenes", "smoke", "sd15-scratch", "sdxl-scratch", "sd15-eval", "sdxl-overnight", "sd35"]
)
def test_dvc_can_change_every_key(name: str, tmp_path) -> None:
    """Overrides by DVC's own code give a file that is read as before."""
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text(config.preset(name))
    before = config.load(path)
    keys = leaves(yaml.safe_load(config.preset(name)))
    apply_overrides(path, [f"{key}=null" for key in keys])
    assert set(leaves(yaml.safe_load(path.read_text())).values()) == {None}
    values = {k: v if isinstance(v, str) else json.dumps(v).replace('"', "") for k, v in keys.items()}
    apply_overrides(path, [f"{key}={value}" for key, value in values.items()])
    assert config.load(path) == before
    apply_overrides(path, ["align.spo.optimizer.learning_rate=1e-6"])
    assert config.load(path).align.spo.optimizer.learning_rate == 1e-6


def test_omitted_keys_are_listed_with_the_defaults_of_the_code(raw) -> None:
    del raw["seed"], raw["align"]["spo"]["beta"], raw["align"]["diffusion_dpo"]["optimizer"]["epsilon"]
    del raw["backbone"]["vae"], raw["preference"]["eval_timesteps"], raw["score"]["hps"]["image_size"]
    del raw["tracking"], raw["registry"], raw["processes"]  # where it is logged and how it runs
    assert config.code_defaults(config.validate(raw)) == {
        "seed": 0,
        "backbone.vae": None,
        "preference.eval_timesteps": [0, 251, 501, 701, 951],
        "align.spo.beta": 10.0,
        "align.diffusion_dpo.optimizer.epsilon": 1e-8,
        "score.hps.image_size": 224,
    }


def test_presets_carry_the_published_recipe() -> None:
    spo = config.validate(yaml.safe_load(config.preset("sd15"))).align.spo
    assert (spo.lora.rank, spo.candidates, spo.num_inference_steps, spo.eta) == (4, 4, 20, 1.0)
    assert (spo.divert_start_step, spo.threshold, spo.beta, spo.clip, spo.guidance) == (4, 0.3, 10, 0.1, 5)
    assert (spo.optimizer.learning_rate, spo.optimizer.weight_decay) == (6e-5, 1e-4)
    assert spo.iterations * spo.prompts_per_iteration == 10 * 4000
    xl = config.validate(yaml.safe_load(config.preset("sdxl"))).align.spo
    assert (xl.lora.rank, xl.candidates, xl.threshold, xl.optimizer.learning_rate) == (64, 2, 0.4, 1e-5)
    assert xl.iterations * xl.prompts_per_iteration == 10 * 4000
    assert (xl.inner_steps, xl.batch_size, spo.inner_steps, spo.batch_size) == (3, 16, 1, 40)
    for section in (spo, xl):
        assert (section.resampler, section.pair_choice, section.timestep_range) == (
            "random",
            "best_worst",
            None,
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("align.spo.betta", 3, "unknown key 'align.spo.betta'; did you mean 'beta'"),
        ("nonsense", 1, "unknown key 'nonsense'"),
        ("align.spo.beta", "ten", "align.spo.beta"),
        ("align.spo.beta", -1, "align.spo.beta"),
        ("align.spo.candidates", 1, "align.spo.candidates"),
        ("preference.steps", 0, "preference.steps"),
        ("backbone.family", "sd4", "backbone.family"),
        ("generate.seed", 1.5, "generate.seed"),
        ("align.spo.threshold", 2, "align.spo.threshold"),
        ("align.spo.resampler", "best", "align.spo.resampler"),
        ("align.spo.inner_steps", 0, "align.spo.inner_steps"),
        (
            "align.spo.timestep_range",
            [750, 0],
            "align.spo.timestep_range: must have the lowest timestep first",
        ),
        ("align.spo.lora.rnak", 2, "unknown key 'align.spo.lora.rnak'; did you mean 'rank'"),
        ("generate.sed", 2, "unknown key 'generate.sed'; did you mean 'seed'"),
        ("pairs.source", "a\0b", "pairs.source: must not contain a NUL or surrogate character"),
    ],
)
def test_a_mistake_names_its_key(raw, key, value, message) -> None:
    *path, last = key.split(".")
    section = raw
    for part in path:
        section = section[part]
    section[last] = value
    with pytest.raises(config.ConfigError, match=message) as error:
        config.validate(raw, "params.yaml")
    assert str(error.value).startswith("params.yaml: ") and "\n" not in str(error.value)


def test_no_lora_means_full_fine_tuning(raw) -> None:
    raw["align"]["spo"]["lora"] = None
    assert config.validate(raw).align.spo.lora is None
    del raw["align"]["spo"]["lora"]
    with pytest.raises(config.ConfigError, match="'align.spo.lora' is missing"):
        config.validate(raw)


def test_a_missing_key_is_named(raw) -> None:
    del raw["align"]["spo"]["iterations"]
    with pytest.raises(config.ConfigError, match="'align.spo.iterations' is missing"):
        config.validate(raw)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", ""])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match="params.yaml"):
        config.load(path)


def test_a_missing_file_says_what_to_do(tmp_path) -> None:
    with pytest.raises(config.ConfigError, match="spo preset scenes"):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", config.preset_names())
def test_a_preset_for_a_card_differs_in_its_memory_alone(name: str) -> None:
    plain, card = (yaml.safe_load(config.preset(name, gib)) for gib in (None, 24))
    assert config.validate(card).device.memory == 24
    card["device"]["memory"] = "auto"
    assert card == plain
    with pytest.raises(config.ConfigError, match="--card 0: give the GiB of a GPU"):
        config.preset(name, 0)
