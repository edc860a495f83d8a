"""The registry: candidates, the gate to `champion`, and the adapter back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

from spo import config
from spo.commands import registry
from spo.runtime.files import write_json
from spo.stages import score
from spo.tracking.store import load_mlflow


def params(**changes: Any) -> config.Params:
    raw = yaml.safe_load(config.preset("smoke")) | {"name": "tiny"}
    raw["registry"] = {"improves": ["pickscore"], "holds": {"hps": 0.5}} | changes
    return config.validate(raw)


def scores(path: str, pickscore: float, hps: float = 30.0, noise: float = 0.1, seed: int = 1000) -> None:
    rows = np.random.default_rng(int(pickscore * 100)).normal(0, noise, 40)
    table = {
        "index": range(40),
        "prompt": [f"{i} circles" for i in range(40)],
        "seed": range(seed, seed + 40),
    }
    Path("outputs/scores").mkdir(parents=True, exist_ok=True)
    pd.DataFrame({**table, "pickscore": pickscore + rows, "hps": hps + rows}).to_csv(
        f"outputs/scores/{path}.csv", index=False
    )


def adapter(value: float) -> None:
    Path("outputs/align/spo").mkdir(parents=True, exist_ok=True)
    save_file({"unet.a": np.full(3, value, np.float32)}, "outputs/align/spo/pytorch_lora_weights.safetensors")


def versions(folder: Path) -> dict[str, str]:
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return {alias: str(v) for alias, v in client.get_registered_model("tiny").aliases.items()}


@pytest.fixture
def candidate(folder: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that was trained and scored; its client. MLflow's flavor is left out: it takes seconds."""

    def save_model(adapter: str, target: str, base: str) -> None:
        shutil.copytree(adapter, f"{target}/adapter_weights")

    flavor = SimpleNamespace(diffusers=SimpleNamespace(save_model=save_model))
    monkeypatch.setattr(registry, "load_mlflow", lambda: flavor)
    scores("base", 20)
    scores("spo", 21)
    adapter(1)
    return load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.mark.parametrize("name", ['it\'s "x" \\ ünï 円 100 % `x`;--', "a' or name = 'b"])
def test_a_model_may_be_called_anything_that_mlflow_takes(candidate: Any, name: str) -> None:
    other = registry.register(params(name="b"))
    first, again = registry.register(params(name=name)), registry.register(params(name=name))
    assert (first.name, first.version, first.alias) == (name, "1", "champion")
    assert again.version == "1", "it is found again, and not the other model's version"
    assert other.version == "1"
    found, method = registry.fetch(params(name=name), "champion")
    assert (found / "pytorch_lora_weights.safetensors").exists() and method == "spo"


@pytest.mark.parametrize("name", ["a/b", "a:b", "..", " ", "x" * 300])
def test_a_name_that_mlflow_refuses_is_one_line_before_anything_is_made(candidate: Any, name: str) -> None:
    for key, changes in (("registry.name ", {"name": name}), ("name (registry.name is null) ", {})):
        settings = params(**changes).model_copy(update={} if changes else {"name": name})
        with pytest.raises(ValueError, match=f"params.yaml: {re.escape(key)}.* is not a model name") as error:
            registry.register(settings)
        assert "\n" not in str(error.value)
    assert candidate.search_registered_models() == []
    assert [e.name for e in candidate.search_experiments()] == ["Default"]


def test_a_deleted_model_is_registered_anew(candidate: Any) -> None:
    registry.register(params())
    candidate.delete_registered_model("tiny")
    with pytest.raises(ValueError, match="no version 'champion' of the model 'tiny'.*run `spo register`"):
        registry.fetch(params(), "champion")
    verdict = registry.register(params())
    assert (verdict.version, verdict.alias) == ("1", "champion")


def test_a_deleted_experiment_is_named_with_what_restores_it(candidate: Any) -> None:
    number = candidate.create_experiment("tiny")
    candidate.delete_experiment(number)
    restore = f"`mlflow experiments restore --experiment-id {number}` brings it back"
    with pytest.raises(ValueError, match=f"registry: .*'tiny' was deleted; {restore}"):
        registry.register(params())
    candidate.restore_experiment(number)
    assert registry.register(params()).version == "1"


def test_a_champion_without_its_run_is_one_line(candidate: Any, folder: Path) -> None:
    """A deleted run still gives its files; one that `mlflow gc` took away does not."""
    registry.register(params())
    run = candidate.get_model_version("tiny", "1").run_id
    candidate.delete_run(run)
    assert registry.fetch(params(), "champion")[1] == "spo"
    shutil.rmtree(folder / ".spo/models")
    store = candidate._tracking_client.store
    store._hard_delete_run(run)
    with pytest.raises(ValueError, match="version 1 of 'tiny' is not in .* delete that version in MLflow"):
        registry.fetch(params(), "champion")
    adapter(2)
    with pytest.raises(ValueError, match="scores/spo.csv of version 1 of 'tiny' is not in"):
        registry.register(params())


@pytest.mark.smoke
@pytest.mark.nightly  # MLflow's flavor takes seconds
def test_an_adapter_comes_back_from_mlflows_flavor(folder: Path, runs: Any) -> None:
    scores("base", 20)
    scores("spo", 21)
    adapter(1)
    assert registry.register(params()).alias == "champion"
    found, _ = registry.fetch(params(), "champion")
    stored = found / "pytorch_lora_weights.safetensors"
    assert stored.read_bytes() == Path("outputs/align/spo", stored.name).read_bytes()


def test_the_champion_passes_the_gate(candidate: Any, folder: Path) -> None:
    Path("reports").mkdir()
    Path("reports/report.html").write_text("page", encoding="utf-8")
    first = registry.register(params())
    assert (first.version, first.alias, first.reasons) == ("1", "champion", [])
    assert registry.register(params()) == registry.Verdict("tiny", "1", "champion", [])
    found, method = registry.fetch(params(), "champion")
    stored = found / "pytorch_lora_weights.safetensors"
    assert stored.read_bytes() == Path("outputs/align/spo", stored.name).read_bytes() and method == "spo"

    adapter(2)
    scores("spo", 20.9)  # above the base, below the champion
    second = registry.register(params())
    assert (second.version, second.alias) == (
        "2",
        "challenger",
    ) and "pickscore over version 1" in second.reasons[0]
    assert versions(folder) == {"champion": "1", "challenger": "2"}
    client = load_mlflow().MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    tags = client.get_model_version("tiny", "2").tags
    assert tags["gate"] == "failed" and "must exceed 0" in tags["gate.pickscore"]

    adapter(3)
    scores("spo", 22, hps=29.2)  # better, but it gave up too much
    third = registry.register(params())
    assert third.alias == "challenger" and "hps" in third.reasons[0] and "-0.5" in third.reasons[0]
    passed = registry.register(params(holds={"hps": 1.0}))
    assert (passed.version, passed.alias) == ("3", "champion")
    assert versions(folder) == {"champion": "3"}, "no longer challenger"
    assert "gate.hps" not in client.get_model_version("tiny", "3").tags
    assert registry.fetch(params(), "1")[0] == found

    adapter(4)
    scores("spo", 25, seed=0)
    assert "seed" in registry.register(params()).reasons[0], "other pictures cannot be compared"
    run = client.get_run(client.get_model_version("tiny", "1").run_id)
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"model", "report", "scores"}
    assert run.data.params["align.spo.beta"] == "10.0"


def test_mistakes_are_one_line(folder: Path, runs: Any) -> None:
    with pytest.raises(ValueError, match="no scores there; run `make repro`"):
        registry.register(params())
    scores("base", 20)
    scores("spo", 21)
    with pytest.raises(ValueError, match="no adapter; run"):
        registry.register(params())
    adapter(1)
    with pytest.raises(ValueError, match="registry: unknown score 'hpz'; known: pickscore, hps"):
        registry.register(params(improves=["hpz"]))
    with pytest.raises(ValueError, match="no version 'best' of the model 'tiny'"):
        registry.fetch(params(), "best")
    away = params().model_copy(update={"tracking": "http://me:secret@127.0.0.1:9"})
    with pytest.raises(ValueError, match="registry: ") as error:
        registry.register(away)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_gate_that_is_none_is_refused() -> None:
    with pytest.raises(config.ConfigError, match="registry.holds.hps"):
        params(holds={"hps": -1})


def test_scores_are_comparable_while_scorers_and_their_parameters_are_the_same(folder: Path) -> None:
    def lock(weight: float = 2.5, **deps: str) -> str:
        files = {"outputs/inputs/imagereward.json": "a", "outputs/images/spo": "b", "src/spo/rewards": "c"}
        stage = {
            "cmd": "spo score spo",
            "deps": [{"path": p, "md5": h} for p, h in (files | deps).items()],
            "params": {"params.yaml": {"score": {"clipscore": {"weight": weight}}}},
        }
        Path("dvc.lock").write_text(
            yaml.safe_dump({"schema": "2.0", "stages": {"score@spo": stage}}), encoding="utf-8"
        )
        return registry.scored_by()

    assert lock() == lock(**{"outputs/images/spo": "other images"})
    assert len({lock(), lock(2.0), lock(**{"outputs/inputs/imagereward.json": "other weights"})}) == 3


@pytest.mark.parametrize("n", [1, 2, 19])
def test_no_champion_below_so_many_prompts(candidate: Any, n: int) -> None:
    for variant in ("base", "spo"):
        path = f"outputs/scores/{variant}.csv"
        pd.read_csv(path).head(n).to_csv(path, index=False)
    verdict = registry.register(params())
    assert verdict.alias == "challenger"
    assert verdict.reasons == [f"scores of {n} prompts; registry.min_prompts is 20"]
    if n >= 2:
        assert registry.register(params(min_prompts=n)).alias == "champion"


def test_several_images_of_a_prompt_count_once(candidate: Any) -> None:
    for variant in ("base", "spo"):
        path = f"outputs/scores/{variant}.csv"
        pd.read_csv(path).assign(prompt=[f"prompt {i // 4}" for i in range(40)]).to_csv(path, index=False)
    assert registry.register(params()).reasons == ["scores of 10 prompts; registry.min_prompts is 20"]


def test_a_gate_of_one_prompt_is_refused() -> None:
    with pytest.raises(config.ConfigError, match="registry.min_prompts"):
        params(min_prompts=1)


def other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "libraries", lambda: ["pillow 8.4.0"])


def test_scores_of_other_libraries_are_made_again(
    candidate: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the images that are with the champion; those in outputs/ are of the candidate by then."""
    Path("outputs/images/spo").mkdir(parents=True)
    Path("outputs/images/spo/images.zip").write_bytes(b"of the first")
    assert registry.register(params()).alias == "champion"
    Path("outputs/images/spo/images.zip").write_bytes(b"of the second")
    other_libraries(monkeypatch)
    adapter(2)
    scores("spo", 30)
    again: list[bytes] = []

    def table(settings: config.Params, images: Path) -> pd.DataFrame:
        again.append((images / "images.zip").read_bytes())
        return pd.read_csv("outputs/scores/spo.csv").assign(pickscore=40.0)

    monkeypatch.setattr(score, "table", table)
    second = registry.register(params())
    assert again == [b"of the first"]
    assert second.alias == "challenger" and "pickscore over version 1 is" in second.reasons[0]


def test_scores_of_other_libraries_are_refused_without_the_images(
    candidate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.register(params()).alias == "champion"
    other_libraries(monkeypatch)
    adapter(2)
    scores("spo", 30)
    (reason,) = registry.register(params()).reasons
    assert "version 1 was scored with other weights, code or libraries; registry: images of version" in reason


def test_the_baseline_is_scored_again_by_what_the_candidate_was(
    candidate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(score.metrics_file("base"), {"pickscore": 20.0, score.SCORED_BY: "other"})
    assert "outputs/images/base is missing" in registry.register(params()).reasons[0]
    Path("outputs/images/base").mkdir(parents=True)
    write_json(score.metrics_file("spo"), {"pickscore": 21.0, score.SCORED_BY: "not what is here"})
    with pytest.raises(ValueError, match=r"outputs/scores/spo.csv: made with other .*; run `spo score spo`"):
        registry.register(params())


def test_a_torn_record_stops_the_gate(candidate: Any) -> None:
    file = score.metrics_file("spo")
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"score_spo.json: truncated or invalid JSON"):
        registry.register(params())
    file.unlink()
    Path("dvc.lock").write_text("<<<<<<< HEAD\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"dvc.lock: "):
        registry.register(params())
    assert candidate.search_registered_models() == []


def test_a_champion_that_register_did_not_make_is_named(candidate: Any) -> None:
    candidate.create_registered_model("tiny")
    run = candidate.create_run("0")
    candidate.create_model_version("tiny", "file://nowhere", run.info.run_id)
    candidate.set_registered_model_alias("tiny", "champion", "1")
    for call in (registry.register, lambda settings: registry.fetch(settings, "champion")):
        with pytest.raises(ValueError, match="version 1 of 'tiny' has no tag '(method|adapter)'"):
            call(params())


def test_scored_by_names_what_made_the_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = registry.scored_by()
    other_libraries(monkeypatch)
    assert registry.scored_by() != here, "even without dvc.lock and record"
    write_json(score.metrics_file("spo"), {score.SCORED_BY: "a"})
    recorded = registry.scored_by()
    monkeypatch.setattr(score, "libraries", lambda: ["pillow 9"])
    assert registry.scored_by() == recorded, "the libraries of then, not of now"
    write_json(score.metrics_file("spo"), {score.SCORED_BY: "b"})
    assert registry.scored_by() != recorded
