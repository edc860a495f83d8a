"""A small run folder with known values, for tests of the report."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from spo import config
from spo.evaluation import seeds
from spo.stages import report as stage

N = 12
NASTY = '<script>alert(1)</script> & a "star"'
PROMPTS = [
    NASTY,
    "NA",
    *(f"prompt number {i}, a large red circle above a small blue star" for i in range(2, N)),
]
SHIFT = {"base": 0.0, "base_high_guidance": 0.5, "diffusion_dpo": 1.0, "lpo": 1.5, "spo": 2.0}
PAIRS = 10  # SPO has four baselines, LPO three, Diffusion-DPO two, more guidance one


class Tracked:
    """Stands for the MLflow run: records what it is given."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.artifacts: list[str] = []
        self.compared: dict[str, float] = {}
        self.parent = SimpleNamespace(exists=lambda: True, log_metrics=self.compared.update)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics

    def log_artifact(self, path: Path, folder: str) -> None:
        self.artifacts.append(path.name)


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    monkeypatch.chdir(folder)
    run = Tracked()

    @contextmanager
    def no_mlflow(*_: Any) -> Iterator[Tracked]:
        yield run

    monkeypatch.setattr(stage, "stage", no_mlflow)
    write_run(folder)
    return run


def write_run(root: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(N, 2))
    for variant, shift in SHIFT.items():
        write_images(root / "outputs/images" / variant, int(60 * shift) + 40)
        columns = {"prompt": PROMPTS, "seed": range(7, 7 + N), "pickscore": 20 + shift + noise[:, 0]}
        alignment = 0.75 - 0.125 * (variant == "spo") + 0.01 * noise[:, 1]
        columns |= {"oracle_aesthetic": 0.25 + shift / 8, "oracle_alignment": alignment}
        (root / "outputs/scores").mkdir(exist_ok=True)
        table = pd.DataFrame({"index": range(N), **columns})
        table.to_csv(root / f"outputs/scores/{variant}.csv", index=False)
    accuracy = {"0": 0.8125, "501": 0.625}
    for name, content in {
        "preference": {"accuracy": accuracy, "n": 90, "n_train": 500, "updates": 40, "seconds": 30.0},
        "preference_unconditioned": {"accuracy": accuracy, "n": 90, "seconds": 29.0},
        "align_spo": {
            "updates": 58,
            "pairs": 1834,
            "seconds": 90.0,
            "iterations": 58,
            "ended": "it gained no more",
        },
        "align_diffusion_dpo": {"updates": 850, "pairs": 13600, "seconds": 60.0},
        "score_base": {"pickscore": 20.0},
    }.items():
        write_json(root / f"reports/metrics/{name}.json", content)
    (root / "reports/training").mkdir()
    lines = ["step,validation/hps,loss,score,learning_rate", "0,20,,,", "1,,.7,,1e-3", "2,21,.6,17.5,1e-3"]
    (root / "reports/training/spo.csv").write_text("\n".join(lines) + "\n")
    (root / "reports/training/diffusion_dpo.csv").write_text("step,loss\n1,.7\n2,.6\n")
    (root / "outputs/align/spo/samples").mkdir(parents=True)
    for update in (0, 58):
        Image.new("RGB", (40, 20), (update, 0, 0)).save(root / f"outputs/align/spo/samples/{update:06d}.png")
    write_json(root / "outputs/prompts/summary.json", {"train": 1200, "removed": {"duplicate": 3}})
    other = [{"method": "spo", "baseline": "base", "metric": "pickscore", "mean_difference": 1.5}]
    other[0] |= {"ci_low": 1.0, "ci_high": 2.0, "win_rate": 1.0, "n": N}
    settings = seeds.settings(params())
    changed = {**settings["align"], "spo": {**settings["align"]["spo"], "beta": 1}}
    for seed, given in ((1, settings), (2, {**settings, "align": changed})):
        content = {"seed": seed, "settings": given, "comparisons": other}
        write_json(root / f"reports/seeds/{seed}.json", content)
    write_json(root / "data/world.json", {"labels": {"ties": 0.0903}, "oracle": {"rendered": {"n": 1000}}})
    out = {"path": "outputs/images/spo", "md5": "0123456789abcdef.dir"}
    stage = {"cmd": "spo generate spo", "outs": [out]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"generate@spo": stage}}))


def write_images(folder: Path, level: int) -> None:
    folder.mkdir(parents=True)
    index = io.StringIO()
    writer = csv.writer(index)
    writer.writerow(["file", "prompt", "seed"])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, prompt in enumerate(PROMPTS):
            buffer = io.BytesIO()
            Image.new("RGB", (48, 48), (level, 10 * i, 90)).save(buffer, format="PNG")
            archive.writestr(f"{i:05d}.png", buffer.getvalue())
            writer.writerow([f"{i:05d}.png", prompt, 7 + i])
        archive.writestr("index.csv", index.getvalue())


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def params(**changes: Any) -> config.Params:
    raw = yaml.safe_load(config.preset("scenes"))
    raw["registry"]["min_prompts"] = 2
    return config.validate({**raw, "report": {"bootstrap_samples": 200, "grid_prompts": 3}, **changes})


def rewrite_prompts(folder: Path, prompts: list[str]) -> None:
    from spo.data.images import load_images, save_images

    images, _, seeds = zip(*load_images(folder), strict=True)
    save_images(folder, images, prompts, seeds)
