"""The registry: candidates, the gate to `champion`, and the adapter back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

from spo import config, registry
from spo.delivery import load_mlflow


def params(**changes: Any) -> config.Params:
    raw = yaml.safe_load(config.preset("smoke")) | {"name": "tiny"}
    raw["registry"] = {"improves": ["pickscore"], "holds": {"hps": 0.5}} | changes
    return config.validate(raw)


def scores(path: str, pickscore: float, hps: float = 30.0, noise: float = 0.1, seed: int = 1000) -> None:
    rows = np.random.default_rng(int(pickscore * 100)).normal(0, noise, 40)
    table = {"index": range(40), "prompt": "a circle", "seed": range(seed, seed + 40)}
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


@pytest.mark.smoke  # MLflow's flavor saves the pipeline six times: 11 s
def test_the_champion_is_who_passes_the_gate(folder: Path, runs: Any) -> None:
    Path("reports").mkdir()
    Path("reports/report.html").write_text("page")
    scores("base", 20)
    scores("spo", 21)
    adapter(1)
    first = registry.register(params())
    assert (first.version, first.alias, first.reasons) == ("1", "champion", [])
    assert registry.register(params()) == registry.Verdict("tiny", "1", "champion", [], False)
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
    assert (passed.version, passed.alias, passed.new) == ("3", "champion", False)
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
    with pytest.raises(ValueError, match="no adapter there"):
        registry.register(params())
    adapter(1)
    with pytest.raises(ValueError, match="registry: no score 'hpz'; there are pickscore, hps"):
        registry.register(params(improves=["hpz"]))
    with pytest.raises(ValueError, match="no 'best' of the model 'tiny'"):
        registry.fetch(params(), "best")
    away = params().model_copy(update={"tracking": "http://me:secret@127.0.0.1:9"})
    with pytest.raises(ValueError, match="registry: ") as told:
        registry.register(away)
    assert "\n" not in str(told.value) and "secret" not in str(told.value)


def test_a_gate_that_is_none_is_refused() -> None:
    with pytest.raises(config.ConfigError, match="registry.holds.hps"):
        params(holds={"hps": -1})
