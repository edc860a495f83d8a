"""What a stage makes of params.yaml, as numbers and texts that can be compared.

The real stages run in this process; MLflow is left out, and models that were loaded with the same settings
are copied instead of read again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import effect_files
import numpy as np
import pandas as pd
import pytest
import small_experiment
import torch
from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, MlflowException
from safetensors.torch import load

from spo import backbones, config, rewards
from spo.commands import registry
from spo.preference import model as preference_model
from spo.rewards import aesthetic
from spo.scenes.oracle import Perception
from spo.tracking import runs

Result = dict[str, Any]  # numpy arrays, and texts or bytes
COUNTED = ("seconds", "unet_samples")  # in metrics: times, and what is computed from the settings alone
NEW = Path("new")  # the outputs of a stage on which others depend
STAND_IN = Path("stand_in")  # a workspace with images and scores of more prompts than are drawn
OUTPUTS = {
    "prompts": ["new/prompts/**/*"],
    "pairs": ["new/pairs/**/*"],
    "preference": ["new/preference/*.safetensors", "reports/metrics/preference.json"],
    "preference latent": ["new/preference_latent/*.safetensors", "reports/metrics/preference_latent.json"],
}


class Untracked:
    """An MLflow run that logs nothing, without a parent."""

    parent = SimpleNamespace(exists=lambda: False)

    def __getattr__(self, name: str) -> Callable[..., dict[str, float]]:
        return lambda *args, **kwargs: {}


@contextlib.contextmanager
def untracked(*args: Any, **kwargs: Any) -> Iterator[Untracked]:
    yield Untracked()


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "stage_run", untracked)
    monkeypatch.setattr(rewards, "load_scorer", functools.cache(rewards.load_scorer))
    monkeypatch.setattr(aesthetic, "Aesthetic", functools.cache(aesthetic.Aesthetic))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").absolute()))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    load_model = functools.cache(preference_model.load_reward_model)
    monkeypatch.setattr(preference_model, "load_reward_model", load_model)
    loaded = functools.cache(backbones.load)
    monkeypatch.setattr(backbones, "load", lambda *args: with_own_unet(loaded(*args)))
    monkeypatch.setattr(
        backbones, "load_described", lambda found, *args: backbones.load(found.settings, *args)
    )
    perceive = Perception.perceive  # images of 48 pixels; those of the tiny model have 16

    def enlarged(self: Perception, images: torch.Tensor, *captions: Any) -> Any:
        return perceive(self, torch.nn.functional.interpolate(images, size=48), *captions)

    monkeypatch.setattr(Perception, "perceive", enlarged)


def with_own_unet(loaded: backbones.StableDiffusion) -> backbones.StableDiffusion:
    """A copy that may be trained; what no stage changes is shared."""
    shared = {id(part): part for name, part in loaded.pipeline.components.items() if name != "unet"}
    return copy.deepcopy(loaded, shared)


def redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no stage overwrites what another reads, and the report does not show the settings."""
    monkeypatch.setattr("spo.stages.prompts.OUTPUT", NEW / "prompts")
    monkeypatch.setattr("spo.stages.pairs.OUTPUT", NEW / "pairs")
    outputs = {None: NEW / "preference", "latent": NEW / "preference_latent"}
    monkeypatch.setattr("spo.stages.preference.OUTPUTS", outputs)
    shown = config.validate(effect_files.experiment()).model_dump(mode="json")
    monkeypatch.setattr("spo.stages.report.public", lambda value: shown)


def run(params: config.Params, stage: str) -> None:
    name, _, item = stage.partition(" ")
    importlib.import_module(f"spo.stages.{name}").run(params, item or None)


def result(stage: str, values: Mapping[str, Any], patterns: list[str] | None = None) -> Result:
    """What a stage makes; a limit that stops it is a result too: the line that says so."""
    params = config.validate(dict(values))
    name, _, item = stage.partition(" ")
    try:
        if name in DIRECT:
            return DIRECT[name](params, item)
        run(params, stage)
    except ValueError as error:
        return {"stopped": str(error)}
    of_item = {
        "align": [f"outputs/align/{item}/**/*.safetensors", f"reports/training/{item}.csv"],
        "generate": [f"outputs/images/{item}/images.zip"],
    }
    found = patterns or OUTPUTS.get(stage) or of_item[name]
    paths = sorted({p for pattern in found for p in Path().glob(pattern) if p.is_file()})
    assert paths, found
    return {f"{path} {k}": v for path in paths for k, v in content(path).items()}


def content(path: Path) -> Result:
    """Numbers and texts of a file: not its metadata, which repeat the settings, nor the seconds it took."""
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        return {k: v.float().numpy() for k, v in load(raw).items()}
    if path.suffix == ".zip":
        return {str(i): image.numpy() for i, image in enumerate(small_experiment.pixels(io.BytesIO(raw)))}
    if path.suffix == ".csv":
        return columns(pd.read_csv(io.BytesIO(raw)))
    if path.suffix == ".json":
        return dict(leaves(json.loads(raw)))
    return {"": raw}


def columns(table: pd.DataFrame) -> Result:
    return {
        str(name): column.to_numpy(float) if pd.api.types.is_numeric_dtype(column) else str(column.tolist())
        for name, column in table.items()
        if "seconds" not in str(name)
    }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not any(name in str(key) for name in COUNTED):
                yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, np.array(value, float) if isinstance(value, int | float) else str(value)


def scored(params: config.Params, variant: str) -> Result:
    from spo.stages import score

    return columns(score.table(params, STAND_IN / "outputs/images" / variant))


class Client:
    """MLflow's registry without a champion; notes what is set."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*args: Any) -> Any:
            if name.startswith(("set", "delete")):
                self.noted.append((name, *args))
            if name == "get_model_version_by_alias":
                raise MlflowException("no such alias", error_code=RESOURCE_DOES_NOT_EXIST)
            return [] if name.startswith("search") else SimpleNamespace(aliases={})

        return note


def registered(params: config.Params, item: str) -> Result:
    """The verdict on the stand-in scores, and what MLflow is given."""
    client = Client()
    version = SimpleNamespace(version="1", tags={})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "Store", lambda uri: SimpleNamespace(connect=lambda: client, name=""))
        patched.setattr(registry, "_create", lambda *args: client.noted.append(args[2:]) or version)
        patched.setattr(registry, "scored_by", lambda variant: "")
        patched.chdir(STAND_IN)
        return {"": str((registry.register(params), client.noted))}


def reported(params: config.Params, item: str) -> Result:
    """Comparisons and page of the stand-in scores."""
    with contextlib.chdir(STAND_IN):
        run(params, "report")
        files = [Path("reports/report.html"), Path("reports/comparisons.json")]
        return {f"{path} {k}": v for path in files for k, v in content(path).items()}


DIRECT: dict[str, Callable[[config.Params, str], Result]] = {
    "score": scored,
    "register": registered,
    "report": reported,
}


def differences(ours: Result, theirs: Result, within: float) -> list[str]:
    """The names of what differs: numbers by more than `within` of 1, or of themselves if they are larger."""
    if ours.keys() != theirs.keys():
        return sorted(ours.keys() ^ theirs.keys())
    return [name for name, value in ours.items() if not _equal(value, theirs[name], within)]


def _equal(a: Any, b: Any, within: float) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return type(a) is type(b) and bool(a == b)
    return a.shape == b.shape and np.allclose(a, b, within, within, equal_nan=True)
