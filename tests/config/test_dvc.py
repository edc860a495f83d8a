"""dvc.yaml and params.yaml agree."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from spo import cli, config

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
SETS = {name: values for entry in DVC["vars"] for name, values in entry.items()}


def stages() -> dict[str, dict]:
    """Every stage of dvc.yaml with its `foreach` written out."""
    told: dict[str, dict] = {}
    for name, stage in DVC["stages"].items():
        if "foreach" not in stage:
            told[name] = stage
            continue
        items = stage["foreach"]
        items = SETS[items.strip("${}")] if isinstance(items, str) else {item: item for item in items}
        for key, item in items.items():
            text = yaml.safe_dump(stage["do"]).replace("${key}", key)
            text = re.sub(r"\$\{item\.(\w+)\}", lambda m, item=item: item[m[1]], text)
            told[f"{name}@{key}"] = yaml.safe_load(text.replace("${item}", str(item)))
    return told


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_preset_has_the_keys_that_stages_depend_on(preset: str) -> None:
    params = yaml.safe_load(config.preset(preset))
    for name, stage in stages().items():
        for key in stage["params"]:
            section = params
            for part in key.split("."):
                assert part in section, f"{name} depends on {key}, which {preset} has not"
                section = section[part]


def test_the_default_experiment_is_the_scenes_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == config.preset("scenes")


def test_stages_run_commands_that_exist_and_name_code_that_exists() -> None:
    for name, stage in stages().items():
        told = cli.parser().parse_args(stage["cmd"].split()[1:])
        assert told.stage == name.split("@")[0].replace("preference_baseline", "preference")
        for path in stage["deps"]:
            assert not path.startswith("src/") or (ROOT / path).exists(), f"{name}: {path}"


def test_every_method_and_variant_has_its_stages() -> None:
    names = set(stages())
    assert {f"align@{m}" for m in config.METHODS} <= names
    assert {f"{s}@{v}" for s in ("generate", "score") for v in config.VARIANTS} <= names


NOT_OF_THE_RESULT = {"model_dump", "model_copy", "name", "tracking"}  # how it is logged


def sections_read(path: Path) -> dict[str, set[str]]:
    """{section: its keys, as far as they are read by name} of `params.section.key` in a module."""
    read: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        match node.value:
            case ast.Name(id="params"):
                read.setdefault(node.attr, set())
            case ast.Attribute(value=ast.Name(id="params"), attr=section):
                read.setdefault(section, set()).add(node.attr)
    return {section: keys for section, keys in read.items() if section not in NOT_OF_THE_RESULT}


@pytest.mark.parametrize("name", sorted(DVC["stages"]))
def test_what_a_stage_reads_of_params_is_what_it_declares(name: str) -> None:
    """An undeclared key that a stage reads would leave stale results; an unread one reruns it for nothing."""
    command = name.replace("preference_baseline", "preference")
    read = sections_read(ROOT / f"src/spo/stages/{command}.py")
    declared = {key for n, stage in stages().items() if n.split("@")[0] == name for key in stage["params"]}
    whole = {key for key in declared if "." not in key}
    for section, keys in read.items():
        assert section in {key.split(".")[0] for key in declared}, f"{name} reads {section}, undeclared"
        for key in keys - {"batch_size"} if section not in whole else ():
            assert any(d.startswith(f"{section}.{key}") for d in declared), f"{name} reads {section}.{key}"
    for section in whole:
        assert section in read, f"{name} declares {section} and does not read it"
