"""Every key of params.yaml does what effects.yaml says: it changes the results, or it must not.

The real stages run in this process on tiny models, once for each key that changes something.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import effect_files
import effects
import pytest
import yaml
from pydantic import BaseModel

from spo import config

TABLE = yaml.safe_load(Path(__file__).with_name("effects.yaml").read_text(encoding="utf-8"))
CLASSES = {"changes": "changes", "stops": "changes", "same": "same"}  # by part of a group
TOP = set(config.Params.model_fields)
# what is run for a scorer, by the section that it is in
SCORED = {"score": "score base", "pairs.filter": "pairs", "preference.labels": "pairs"}


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section, and an optional section itself."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if not inner or type(None) in kinds:
            yield prefix + name
        for kind in inner:
            yield from keys(kind, f"{prefix}{name}.")


def in_full(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of a group by part; those of a method are written without it."""
    stage, _, method = group["stage"].partition(" ")
    prefix = f"align.{method}." if stage == "align" else ""
    return {
        part: {
            key if key.partition(".")[0] in TOP else prefix + key: value
            for key, value in group.get(part, {}).items()
        }
        for part in ("with", *CLASSES)
    }


def of_scorers() -> Iterator[dict[str, Any]]:
    """A group for each scorer in each section that has scorers; `score` has three in any case."""
    for section, stage in SCORED.items():
        for name, scorer in TABLE["scorers"].items():
            files = scorer["files"]
            rules = {"win_lose_above": {name: -1e9}} if section == "pairs.filter" else {"gap": 1e-9}
            alone = {f"score.{name}": files} if section == "score" else {section: {name: files, **rules}}
            parts = {
                part: {f"{section}.{name}.{key}": value for key, value in scorer[part].items()}
                for part in ("changes", "stops")
            }
            yield {"stage": stage, "with": alone, **parts}
    for name in ("imagereward", "clipscore"):  # which the experiment leaves out
        yield {"stage": "score base", "changes": {f"score.{name}": TABLE["scorers"][name]["files"]}}
    yield {"stage": "score base", "changes": {"score.aesthetic": None}}


GROUPS = [*TABLE["groups"], *of_scorers()]


def classes() -> dict[str, set[str]]:
    """The classes of each key of the table."""
    found: dict[str, set[str]] = {key: {"covered"} for key in TABLE["covered"]}
    # a scorer's section where there must be one: its keys change results
    found |= {f"{section}.{name}": {"changes"} for section in (*SCORED,)[1:] for name in TABLE["scorers"]}
    for group in GROUPS:
        parts = in_full(group)
        for part, name in CLASSES.items():
            for key in parts[part]:
                found.setdefault(key, set()).add(name)
    return found


def test_every_key_has_one_class() -> None:
    assert {key: found for key, found in classes().items() if len(found) > 1} == {}
    known = set(keys(config.Params))
    assert sorted(known - set(classes())) == [], "say in effects.yaml what these change"
    assert sorted(set(classes()) - known) == []


@pytest.mark.parametrize("key", TABLE["covered"])
def test_what_is_tested_elsewhere_is_there(key: str) -> None:
    for place in TABLE["covered"][key]:
        file, name = place.split("::")
        source = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
        (test,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name]
        decorators = [ast.get_source_segment(source, d) for d in test.decorator_list]
        text = "".join(map(str, [*decorators, ast.get_source_segment(source, test)]))
        assert key.rsplit(".", 1)[-1] in text, f"{place} does not mention {key}"


@pytest.fixture(scope="module")
def made(words, tmp_path_factory) -> Iterator[None]:
    """The experiment after its stages, and other files of every kind, in the working folder."""
    folder = tmp_path_factory.mktemp("effects")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patched:
        effect_files.write(words)
        effects.patch(patched)
        own = {f"generate.{method}.adapter": None for method in config.METHODS}  # they are not there yet
        params = config.validate(changed(effect_files.experiment(), own))
        for stage in ("inputs", "prompts", "pairs", "preference", "preference latent"):
            effects.run(params, stage)
        for method in config.METHODS:
            effects.run(params, f"align {method}")
            shutil.copytree(f"outputs/align/{method}", f"adapters/{method}")
        effects.redirect(patched)
        yield


def changed(params: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    params = copy.deepcopy(params)
    for key, value in values.items():
        *path, last = key.split(".")
        section = functools.reduce(lambda inner, name: inner[name], path, params)
        section[last] = copy.deepcopy(value)
    return params


def title(group: dict[str, Any]) -> str:
    return " ".join([group["stage"], *in_full(group)["with"]])


def marks(group: dict[str, Any]) -> list[pytest.MarkDecorator]:
    """Each stage always runs, with one training of its kind; other trainings and scorers run nightly."""
    always = (
        "align spo",
        "generate base",
        "pairs",
        "preference",
        "prompts",
        "register",
        "report",
        "score base",
    )
    of_pairs = any(key.startswith((*SCORED,)[1:]) for key in in_full(group)["with"])
    return [] if group["stage"] in always and not of_pairs else [pytest.mark.nightly]


@pytest.mark.smoke  # 350 runs of stages: 80 s
@pytest.mark.parametrize("group", [pytest.param(g, id=title(g), marks=marks(g)) for g in GROUPS])
def test_each_key_changes_what_the_table_says(made, group) -> None:
    stage, of, files = group["stage"], in_full(group), group.get("files")
    params = changed(effect_files.experiment(), of["with"])
    before = effects.result(stage, params, files)
    assert "stopped" not in before, before
    for key, value in of["changes"].items():
        after = effects.result(stage, changed(params, {key: value}), files)
        assert "stopped" not in after, (key, after)
        assert effects.differences(after, before, 0), f"{key}: {value} changes no bit"
    for key, value in of["stops"].items():
        line = effects.result(stage, changed(params, {key: value}), files).get("stopped", "")
        assert key.rsplit(".", 1)[-1] in line, f"{key}: {value} does not stop the stage: {line}"
    if of["same"]:
        after = effects.result(stage, changed(params, of["same"]), files)
        found = effects.differences(after, before, group.get("within", 0))
        assert [name for name in found if name.split()[-1] not in group.get("except", [])] == [], of["same"]
