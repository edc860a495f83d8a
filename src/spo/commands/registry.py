"""Register aligned models in MLflow: each is a version, and the best version has the alias `champion`.

A version gets the alias `champion` only if it passes the gate of params.yaml's `registry` against the current
champion, or against the baseline as long as no version is champion; else it gets the alias `challenger`, with
the reasons.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import SCORERS, Params
from spo.evaluation import model_card
from spo.runtime.files import locked
from spo.runtime.messages import redact
from spo.runtime.workspace import home
from spo.tracking import dvc_lock
from spo.tracking.provenance import code, flatten
from spo.tracking.records import literal, load_mlflow, reason
from spo.tracking.runs import tracking_uri
from spo.tracking.store import Store

if TYPE_CHECKING:
    from pandas import DataFrame

CHAMPION, CHALLENGER = "champion", "challenger"
REPORT = ("report.html", "comparisons.json", "grid.png")
SCORED_BY = (*SCORERS, "oracle")


@dataclass(frozen=True)
class Verdict:
    """A version, its alias, and the reasons why it is not the champion."""

    name: str
    version: str
    alias: str
    reasons: list[str]  # empty for the champion
    new: bool


def model_name(params: Params) -> str:
    """The name of the registered model.

    Raises:
        ValueError: a name that MLflow does not accept.
    """
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

    Raises:
        ValueError: a model without an adapter or scores, or MLflow is unreachable or refuses.
    """
    method, name = params.registry.method, model_name(params)
    table = _scores(Path(f"outputs/scores/{method}.csv"))
    adapter = Path("outputs/align") / method
    if not any(adapter.glob("*.safetensors")):
        raise ValueError(f"{adapter}: no adapter; run `make repro`")
    lock_file = home() / ".spo/registry.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with _connected(params) as store, locked(lock_file):
        client = store.connect()
        tags = {"method": method, "adapter": _digest(adapter), "scored_by": scored_by()}
        known = _find(client, name, tags)
        version = known or _create(store, params, adapter, tags)
        champion = _champion(client, name)
        if champion is not None and str(champion.version) == str(version.version):
            return Verdict(name, str(version.version), CHAMPION, [], known is None)
        against, baseline = _opponent(store, params, champion)
        failures = gate(params, table, baseline, against)
        if champion is not None and champion.tags.get("scored_by") != tags["scored_by"]:
            failures = {"scorers": f"{against} was scored by other scorers: register it again after a repro"}
        return _set_alias(client, name, version, failures, known is None)


def gate(params: Params, candidate: DataFrame, baseline: DataFrame, against: str) -> dict[str, str]:
    """Apply the gate to scores that are paired by prompt and seed.

    Returns:
        The reason of failure by metric; empty if the candidate passes.

    Raises:
        ValueError: a metric of the gate without scores.
    """
    from spo.evaluation import statistics

    settings = params.registry
    metrics = (*settings.improves, *settings.holds)
    unknown = [m for m in metrics if m not in statistics.metrics(candidate)]
    if unknown:
        raise ValueError(
            f"registry: unknown score {unknown[0]!r}; known: {', '.join(statistics.metrics(candidate))}"
        )
    try:
        statistics.check_same_rows("the candidate", candidate, against, baseline)
    except ValueError as error:
        return {"rows": str(error)}
    candidate, baseline = statistics.prompt_means(candidate), statistics.prompt_means(baseline)
    reasons = {}
    for metric in dict.fromkeys(metrics):
        bound = 0.0 if metric in settings.improves else -settings.holds[metric]
        row = statistics.compare(
            candidate[metric].to_numpy(),
            baseline[metric].to_numpy(),
            params.report.bootstrap_samples,
            params.seed,
        )
        enough = row["ci_low"] > bound if metric in settings.improves else row["ci_low"] >= bound
        if not enough:
            interval = f"{row['mean_difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
            rule = "must exceed 0" if metric in settings.improves else f"must not be below {bound:g}"
            reasons[metric] = f"{metric} over {against} is {interval}: its lower bound {rule}"
    return reasons


def fetch(params: Params, alias: str) -> tuple[Path, str]:
    """Download a version by alias or number, unless it is cached.

    Returns:
        The folder of its adapter, and its method.

    Raises:
        ValueError: no such version, or MLflow is unreachable.
    """
    name = model_name(params)
    with _connected(params) as store:
        client = store.connect()
        try:
            version = (
                client.get_model_version(name, alias)
                if alias.isdigit()
                else client.get_model_version_by_alias(name, alias)
            )
        except Exception as error:
            if not _is_missing(error):
                raise
            raise ValueError(
                f"registry: no version {alias!r} of the model {name!r} in {store.name}; run `spo register`"
            ) from None
        target = home() / ".spo/models" / f"{name}-{version.version}-{version.tags['adapter'][:12]}"
        folder = _download(store, version, "model/adapter_weights", target)
        return folder, version.tags["method"]


def scored_by() -> str:
    """SHA-256 of the scorers' hashes and parameters: scores with the same value are comparable."""
    entries = dvc_lock.read().values()
    used = {k: v for e in entries for k, v in (e.deps | e.outs).items() if _is_scorer(Path(k))}
    used |= {k: repr(v) for e in entries if e.words[0] == "score" for k, v in e.params.items()}
    return hashlib.sha256(repr(sorted(used.items())).encode()).hexdigest()


def _is_scorer(path: Path) -> bool:
    return path.stem in SCORED_BY or path.is_relative_to("src/spo/rewards")


def _create(store: Store, params: Params, adapter: Path, tags: dict[str, str]) -> Any:
    """Create a run with all files of the candidate, and the version that points to it."""
    client, name = store.connect(), model_name(params)
    try:  # before the run, because MLflow may refuse the name
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    entry = dvc_lock.read().get(f"align@{tags['method']}")
    logged = {k: str(v) for k, v in flatten(params.model_dump()).items()}
    source = {"dvc.lock_hash": entry.hash} if entry else {}
    run_id = store.start_run(params.name, f"candidate-{tags['method']}", {**code(), **tags, **source}, logged)
    with tempfile.TemporaryDirectory() as folder:
        load_mlflow().diffusers.save_model(str(adapter), f"{folder}/model", _base(params))
        client.log_artifacts(run_id, folder)
    for file in (p for p in map(Path("reports").joinpath, REPORT) if p.exists()):
        client.log_artifact(run_id, str(file), "report")
    client.log_artifact(run_id, f"outputs/scores/{tags['method']}.csv", "scores")
    if card := _card(adapter, tags["method"]):
        client.log_text(run_id, card, "model/README.md")
    client.set_terminated(run_id)
    artifacts = client.get_run(run_id).info.artifact_uri
    return client.create_model_version(name, f"{artifacts}/model", run_id, tags={**tags, **source})


def _card(adapter: Path, method: str) -> str | None:
    """The model card that `align` wrote, with the scores; None without a card or comparisons."""
    written, compared = adapter / "README.md", Path("reports/comparisons.json")
    if not written.exists() or not compared.exists():
        return None
    scores = model_card.scores(json.loads(compared.read_text(encoding="utf-8")), method)
    return f"{written.read_text(encoding='utf-8')}\n{scores}"


def _set_alias(client: Any, name: str, version: Any, failures: Mapping[str, str], new: bool) -> Verdict:
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
    return Verdict(name, number, alias, list(failures.values()), new)


def _opponent(store: Store, params: Params, champion: Any) -> tuple[str, DataFrame]:
    """The name and the scores of the champion, or of the baseline while there is no champion."""
    if champion is None:
        baseline = params.registry.baseline
        return baseline, _scores(Path(f"outputs/scores/{baseline}.csv"))
    with tempfile.TemporaryDirectory() as folder:
        path = _download(store, champion, f"scores/{champion.tags['method']}.csv", Path(folder) / "scores")
        return f"version {champion.version}", _scores(path)


def _download(store: Store, version: Any, path: str, target: Path) -> Path:
    """Download an artifact of a version's run, unless it is cached; the download is atomic.

    Raises:
        ValueError: a run or an artifact that was deleted from the store.
    """
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
                    f"registry: {path} of version {version.version} of {version.name!r} is gone from "
                    f"{store.name} ({reason(error)}); delete that version in MLflow and register again"
                ) from None
            done.parent.mkdir(parents=True, exist_ok=True)
            Path(downloaded).rename(done)
    return done


def _scores(path: Path) -> DataFrame:
    from pandas import read_csv

    if not path.exists():
        raise ValueError(f"{path}: no such scores; run `make repro`")
    return read_csv(path, keep_default_na=False, dtype={"prompt": str})


def _find(client: Any, name: str, tags: Mapping[str, str]) -> Any:
    """The version with the same adapter and scorers, or None."""
    query = f"tags.`adapter` = {literal(tags['adapter'])}"  # not by name, which may contain quotes
    for version in client.search_model_versions(query):
        if version.name == name and all(version.tags.get(k) == v for k, v in tags.items()):
            return version
    return None


def _champion(client: Any, name: str) -> Any:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except Exception as error:
        if _is_missing(error):
            return None
        raise


def _is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _base(params: Params) -> str:
    """The base checkpoint; a relative folder as ./folder, so that MLflow does not look it up on the hub."""
    path = params.backbone.checkpoint
    return f"./{path}" if Path(path).exists() and not Path(path).is_absolute() else path


@contextmanager
def _connected(params: Params) -> Iterator[Store]:
    """Connect to MLflow's store; any error of MLflow becomes one line."""
    store = Store(tracking_uri(params.tracking))
    try:
        yield store
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"registry: {redact(store.name)}: {reason(error)}") from None
