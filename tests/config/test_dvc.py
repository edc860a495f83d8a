"""dvc.yaml and params.yaml agree."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spo import api, cli, config
from spo.data import latents
from spo.stages import align, generate, preference

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
SETS = {name: values for entry in DVC["vars"] for name, values in entry.items()}


def stages() -> dict[str, dict]:
    """Every stage of dvc.yaml, with `foreach` expanded."""
    expanded: dict[str, dict] = {}
    for name, stage in DVC["stages"].items():
        if "matrix" in stage:  # of suites: without suites there are no such stages
            assert config.load(ROOT / "params.yaml").generate.suites == {}
            continue
        if "foreach" not in stage:
            expanded[name] = stage
            continue
        items = stage["foreach"]
        items = SETS[items.strip("${}")] if isinstance(items, str) else {item: item for item in items}
        for key, item in items.items():
            text = yaml.safe_dump(stage["do"]).replace("${key}", key)
            text = re.sub(r"\$\{item\.(\w+)\}", lambda m, item=item: item[m[1]], text)
            expanded[f"{name}@{key}"] = yaml.safe_load(text.replace("${item}", str(item)))
    return expanded


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_preset_has_the_keys_that_stages_depend_on(preset: str) -> None:
    params = yaml.safe_load(config.preset(preset))
    for name, stage in stages().items():
        for key in stage["params"]:
            section = params
            for part in key.split("."):
                assert part in section, f"{name} depends on {key}, which {preset} lacks"
                section = section[part]


def test_the_default_experiment_is_the_scenes_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == config.preset("scenes")


def test_dvc_reads_it() -> None:
    """Lists of unequal length, and a path that a stage names twice, are errors only for DVC."""
    from dvc.repo import Repo

    names = {stage.name for stage in Repo(str(ROOT)).index.stages if stage.cmd is not None}
    assert names == set(stages()) and len(names) == 23


def test_a_suite_has_its_stages_of_every_variant(tmp_path, monkeypatch) -> None:
    from dvc.repo import Repo

    text = (ROOT / "params.yaml").read_text()
    params = re.sub(r"  suites: \{\}", "  suites: {parti: own/parti.tsv}", text)
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    repo = Repo.init(str(tmp_path), no_scm=True)
    suites = {stage.name: stage for stage in repo.index.stages if "suite" in stage.name}
    variants = {*config.VARIANTS}
    drawn = [name for name in suites if name.startswith("generate_suite")]
    assert {name.partition("@")[2] for name in drawn} == {f"{variant}-parti" for variant in variants}
    assert {name for name in suites if name.startswith("score_")} == {
        f"score_suite@{variant}-parti" for variant in variants
    }
    for name, stage in suites.items():
        args = cli.parser().parse_args(stage.cmd.split()[1:])
        assert (args.variant, args.suite) == tuple(name.partition("@")[2].split("-"))
        for dep in stage.deps:
            path = getattr(dep, "def_path", "")
            assert not path.startswith("src/") or (ROOT / path).exists(), f"{name}: {path}"
    method = suites["generate_suite@spo-parti"]
    paths = {dep.def_path for dep in method.deps}
    assert {"outputs/align/spo", "outputs/prompts/suites/parti.txt"} <= paths


def test_stages_run_commands_that_exist_and_name_code_that_exists() -> None:
    for name, stage in stages().items():
        args = cli.parser().parse_args(stage["cmd"].split()[1:])
        assert args.stage == name.split("@")[0].replace("preference_baseline", "preference").replace(
            "preference_latent", "preference"
        )
        for path in stage["deps"]:
            assert not path.startswith("src/") or (ROOT / path).exists(), f"{name}: {path}"


def test_every_method_and_variant_has_its_stages() -> None:
    names = set(stages())
    assert {f"align@{m}" for m in config.METHODS} <= names
    assert {f"{s}@{v}" for s in ("generate", "score") for v in config.VARIANTS} <= names


def test_every_stage_after_inputs_depends_on_the_defaults_of_omitted_keys() -> None:
    for name, stage in stages().items():
        assert ("outputs/inputs/defaults.json" in stage["deps"]) == (name != "inputs"), name


def has_default(key: str) -> bool:
    model: Any = config.Params
    for part in key.split("."):
        field = model.model_fields[part]
        model = field.annotation
    return not field.is_required()


def test_inputs_names_the_optional_keys_that_later_stages_name() -> None:
    """DVC refuses a missing key: better before the first stage than in the last."""
    named = {key for stage in stages().values() for key in stage["params"] if has_default(key)}
    assert {"seed", "generate.eta", "score.oracle"} <= named
    assert named <= set(stages()["inputs"]["params"])
    of_no_output = {key for key in named if key.split(".")[0] in ("processes", "tracking", "registry")}
    assert of_no_output == {"registry.min_prompts"}, "intervals on the page"


# what computes no weight and draws no image: the dry run, readers of foreign adapters and of prompt lists,
# tracking, messages
NO_RESULT = ("adapters", "cli.py", "commands", "estimate", "ingest", "runtime", "tracking")


def test_no_training_and_no_generation_depends_on_code_that_changes_no_result() -> None:
    """Editing it makes `dvc status` name no stage that trains or draws, and loses no resume state.

    Images of a foreign adapter do depend on its reader.
    """
    depended = {
        name: [dep.removeprefix("src/spo/") for dep in stage["deps"] if dep.startswith("src/spo/")]
        for name, stage in stages().items()
        if name.startswith(("preference", "align", "generate"))
    }
    assert len(depended) == 13
    resumed = {m.__name__: m.CODE for m in (preference, align, generate, latents, api)}
    for name, paths in {**depended, **resumed}.items():
        assert paths and "." not in paths and "" not in paths
        free = {*NO_RESULT} - ({"adapters"} if "generate" in name else set())
        assert not [path for path in paths if Path(path).parts[0] in free], name
