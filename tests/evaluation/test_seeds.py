"""Saved seeds: settings that differ, mean and deviation by hand, files of something else."""

import json
from pathlib import Path

import pytest
import yaml

from spo import config
from spo.evaluation import seeds
from spo.evaluation.seeds import Seeds

ROOT = Path(__file__).parents[2]


def row(difference: float, metric: str = "aesthetic") -> dict:
    row = {"method": "spo", "baseline": "base", "metric": metric, "mean_difference": difference}
    return row | {"ci_low": difference - 0.1, "ci_high": difference + 0.1, "win_rate": 1.0, "n": 4}


def params(seed: int = 0, **changes) -> config.Params:
    raw = yaml.safe_load(config.preset("smoke"))
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        raw[section] |= {rest: value}
    return config.validate({**raw, "seed": seed})


def save(folder: Path, of: config.Params, name: str = "saved", **changes) -> None:
    content = {"seed": of.seed, "settings": seeds.settings(of), "comparisons": [row(0.5)]} | changes
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_another_seed_is_read_and_the_same_seed_is_not(tmp_path) -> None:
    save(tmp_path, params(seed=1), "1")
    save(tmp_path, params(seed=0, report__grid_prompts=1), "0")  # changes no result
    assert seeds.read(params(), tmp_path) == Seeds({1: [row(0.5)]}, {})


def test_another_experiment_is_named_with_the_key_that_differs(tmp_path) -> None:
    save(tmp_path, params(seed=1, prompts__n_train=9))
    assert seeds.read(params(), tmp_path) == Seeds({}, {"saved.json": "prompts.n_train"})


def test_a_method_that_only_one_of_them_has_makes_no_difference(tmp_path) -> None:
    saved = seeds.settings(params())
    less = {m: s for m, s in saved["align"].items() if m != "lpo"}
    save(tmp_path, params(seed=1), "1", settings={**saved, "align": less})
    save(tmp_path, params(seed=2), "2", settings={**saved, "align": {**saved["align"], "third": {"beta": 1}}})
    null = {**saved["align"], "lpo": None}
    save(tmp_path, params(seed=3), "3", settings={**saved, "align": null})
    assert {*seeds.read(params(), tmp_path).comparisons} == {1, 2, 3}


def test_seeds_have_their_mean_and_standard_deviation() -> None:
    others = Seeds({1: [row(0.5)], 2: [row(0.2), row(9.0, metric="hps")]}, {})
    found = seeds.table(0, [row(0.2), row(1.0, "pickscore")], others)
    assert list(found) == ["seed 0", "seed 1", "seed 2", "mean", "std"]
    assert list(found.index) == [("spo", "base", "aesthetic")]  # others were measured with one seed
    assert found.iloc[0].tolist() == pytest.approx([0.2, 0.5, 0.2, 0.3, 0.03**0.5])
    assert seeds.table(0, [row(0.2)], Seeds({}, {})) is None


def test_a_file_of_something_else_is_one_line(tmp_path) -> None:
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wrong.json: no key 'seed'; remove it and run `spo keep` again"):
        seeds.read(params(), tmp_path)
    save(tmp_path, params(seed=1), "wrong", comparisons=[{"method": "spo"}])
    with pytest.raises(ValueError, match=r"wrong.json: row 0 has no 'baseline'; remove it"):
        seeds.read(params(), tmp_path)
    for changes in ({"settings": 1}, {"settings": {"align": 1}}, {"comparisons": None}):
        save(tmp_path, params(seed=1), "wrong", **changes)
        with pytest.raises(ValueError, match=r"wrong.json: not a file of `spo keep`; remove it"):
            seeds.read(params(), tmp_path)


def test_the_seeds_of_the_repository_are_of_the_default_experiment() -> None:
    """A key that got another meaning has to be translated in them, or they are of another experiment."""
    found = seeds.read(config.load(ROOT / "params.yaml"), ROOT / seeds.FOLDER)
    assert {*found.comparisons} == {1, 2} and not found.others
