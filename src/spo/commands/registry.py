"""Register aligned models in MLflow: each is a version, and the best version has the alias `champion`.

A version gets the alias `champion` only if it passes the gate of params.yaml's `registry` against the current
champion, or against the baseline as long as no version is champion; else it gets the alias `challenger`, with
the reasons.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.commands.gate import gate, scored_again, scored_by
from spo.config import Params
from spo.evaluation import results
from spo.publish import card
from spo.runtime.files import locked, read_text
from spo.runtime.fingerprint import fingerprint
from spo.runtime.workspace import home
from spo.tracking import dvc_lock
from spo.tracking.provenance import code, flatten, texts
from spo.tracking.store import Store, load_mlflow, reason, tracking_uri

if TYPE_CHECKING:
    from pandas import DataFrame

CHAMPION, CHALLENGER = "champion", "challenger"
REPORT = ("report.html", "comparisons.json", "grid.png")


@dataclass(frozen=True)
class Verdict:
    """A version, its alias, and the reasons why it is not the champion."""

    name: str
    version: str
    alias: str
    reasons: list[str]  # empty for the champion


def model_name(params: Params) -> str:
    """The name of the registered model, which MLflow must accept."""
    name = params.registry.name or params.name
    key = "registry.name" if params.registry.name else "name (registry.name is null)"
    if any(c in name for c in "/:") or not name.strip() or name in (".", "..") or len(name.encode()) > 200:
        rule = "it must not be blank, . or .., contain / or :, or have more than 200 bytes"
        raise ValueError(
            f"params.yaml: {key} {name[:80]!r} is not a model name for MLflow: {rule}; set registry.name"
        )
    return name


def register(params: Params) -> Verdict:
    """Register the model of `registry.method` with adapter, scores and report, and apply the gate.

    A model that is already registered keeps its version; the gate is applied again.
    """
    method, name = params.registry.method, model_name(params)
    table = results.read_scores(Path(f"outputs/scores/{method}.csv"))
    adapter = Path("outputs/align") / method
    if not any(adapter.glob("*.safetensors")):
        raise ValueError(f"{adapter}: no adapter; run `make repro`")
    lock_file = home() / ".spo/registry.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with _connected(params) as store, locked(lock_file):
        client = store.connect()
        tags = {"method": method, "adapter": fingerprint((), [adapter], ()), "scored_by": scored_by(method)}
        known, champion = _find(client, name, tags), _version(client, name, CHAMPION)
        if known and champion and known.version == champion.version:
            return Verdict(name, str(known.version), CHAMPION, [])
        failures = _compare(store, params, table, champion, tags["scored_by"])
        version = known or _create(store, params, adapter, tags)
        return _set_alias(client, name, version, failures)


def _compare(store: Store, params: Params, table: DataFrame, champion: Any, made_with: str) -> dict[str, str]:
    """Apply the gate against the champion, or against the baseline while there is no champion.

    Images are scored again if their scores come from other weights, code or libraries.
    """
    with tempfile.TemporaryDirectory() as folder:
        if champion is None:
            against = params.registry.baseline
            scores, images = Path(f"outputs/scores/{against}.csv"), Path(f"outputs/images/{against}")
            by = scored_by(against)
        else:
            against, by = f"version {champion.version}", champion.tags.get("scored_by")
            scores = _download(store, champion, f"scores/{_tag(champion, 'method')}.csv", Path(folder))
            images = Path(folder, "images")
        baseline = results.read_scores(scores)
        if by == made_with:
            return gate(params, table, baseline, against)
        other = f"{against} was scored with other weights, code or libraries"
        try:
            if champion is not None:
                _download(store, champion, "images", Path(folder))
        except ValueError as error:
            return {"scorers": f"{other}; {error}"}
        if not images.exists():
            return {"scorers": f"{other}, and {images} is missing"}
        return gate(params, table, scored_again(params, images), against)


def fetch(params: Params, alias: str) -> tuple[Path, str]:
    """Download a version, unless it is in .spo/models; returns the folder of its adapter, and its method."""
    name = model_name(params)
    with _connected(params) as store:
        version = _version(store.connect(), name, alias)
        if version is None:
            raise ValueError(
                f"registry: no version {alias!r} of the model {name!r} in {store.name}; run `spo register`"
            )
        target = home() / ".spo/models" / f"{name}-{version.version}-{_tag(version, 'adapter')[:12]}"
        folder = _download(store, version, "model/adapter_weights", target)
        return folder, _tag(version, "method")


def _create(store: Store, params: Params, adapter: Path, tags: dict[str, str]) -> Any:
    """Create a run with all files of the candidate, and the version that points to it."""
    client, name = store.connect(), model_name(params)
    try:  # before the run, because MLflow may refuse the name
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    entry = dvc_lock.read().get(f"align@{tags['method']}")
    logged = texts(flatten(params.model_dump()))
    source = {"dvc.lock_hash": entry.hash} if entry else {}
    run_id = store.start_run(params.name, f"candidate-{tags['method']}", {**code(), **tags, **source}, logged)
    with tempfile.TemporaryDirectory() as folder:
        # by its absolute path, so that the model loads from any folder here; on another machine MLflow's
        # `load_pipeline(base_model=...)` names it
        base = Path(params.backbone.checkpoint)
        checkpoint = str(base.resolve() if base.exists() else params.backbone.checkpoint)
        load_mlflow().diffusers.save_model(str(adapter), f"{folder}/model", checkpoint)
        client.log_artifacts(run_id, folder)
    for file in (p for p in map(Path("reports").joinpath, REPORT) if p.exists()):
        client.log_artifact(run_id, str(file), "report")
    client.log_artifact(run_id, f"outputs/scores/{tags['method']}.csv", "scores")
    if (images := Path("outputs/images") / tags["method"]).exists():  # to be scored again by other scorers
        client.log_artifacts(run_id, str(images), "images")
    if text := _card(adapter, tags["method"]):
        client.log_text(run_id, text, "model/README.md")
    client.set_terminated(run_id)
    artifacts = client.get_run(run_id).info.artifact_uri
    return client.create_model_version(name, f"{artifacts}/model", run_id, tags={**tags, **source})


def _card(adapter: Path, method: str) -> str | None:
    """The model card that `align` wrote, with the scores; None without a card or comparisons."""
    if not (adapter / card.FILE).exists() or not results.COMPARISONS.exists():
        return None
    rows = [row for row in results.read_comparisons() if row["method"] == method]
    return card.with_scores(read_text(adapter / card.FILE, "model card"), rows)


def _set_alias(client: Any, name: str, version: Any, failures: Mapping[str, str]) -> Verdict:
    """Set alias and tags of a version by the result of the gate."""
    number = str(version.version)
    for tag in (t for t in version.tags if t.startswith("gate.") and t.removeprefix("gate.") not in failures):
        client.delete_model_version_tag(name, number, tag)
    for metric, failure in failures.items():
        client.set_model_version_tag(name, number, f"gate.{metric}", failure)
    client.set_model_version_tag(name, number, "gate", "failed" if failures else "passed")
    alias = CHALLENGER if failures else CHAMPION
    client.set_registered_model_alias(name, alias, number)
    if not failures and str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number:
        client.delete_registered_model_alias(name, CHALLENGER)
    return Verdict(name, number, alias, list(failures.values()))


def _download(store: Store, version: Any, path: str, target: Path) -> Path:
    """Download an artifact of a version's run to target/path, unless it is there; complete or not at all."""
    done = target / path
    if not done.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as partial:
            try:
                downloaded = store.connect().download_artifacts(version.run_id, path, partial)
            except Exception as error:
                if not _is_missing(error) and not isinstance(error, OSError):
                    raise
                raise ValueError(
                    f"registry: {path} of version {version.version} of {version.name!r} is not in "
                    f"{store.name} ({reason(error)}); delete that version in MLflow and register again"
                ) from None
            done.parent.mkdir(parents=True, exist_ok=True)
            Path(downloaded).rename(done)
    return done


def _find(client: Any, name: str, tags: Mapping[str, str]) -> Any:
    """The version with the same adapter and scorers, or None."""
    query = f"tags.`adapter` = '{tags['adapter']}'"  # not by name, which may contain quotes
    found = client.search_model_versions(query)
    return next((v for v in found if v.name == name and tags.items() <= v.tags.items()), None)


def _version(client: Any, name: str, alias: str) -> Any:
    """The version with an alias or number, or None."""
    get = client.get_model_version if alias.isdigit() else client.get_model_version_by_alias
    try:
        return get(name, alias)
    except Exception as error:
        if not _is_missing(error):
            raise
        return None


def _tag(version: Any, key: str) -> str:
    if key not in version.tags:
        raise ValueError(
            f"registry: version {version.version} of {version.name!r} has no tag {key!r}: `spo register` did "
            f"not make it; give its aliases to another version"
        )
    return str(version.tags[key])


def _is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@contextmanager
def _connected(params: Params) -> Iterator[Store]:
    """Connect to MLflow's store; any error of MLflow becomes one line."""
    store = Store(tracking_uri(params.tracking))
    try:
        yield store
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"registry: {store.name}: {reason(error)}") from None
