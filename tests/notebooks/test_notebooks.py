"""The notebooks: committed without outputs, and each runs on what a run leaves behind."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from PIL import Image

from spo.evaluation import statistics

FOLDER = Path(__file__).parents[2] / "notebooks"
N = 8


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.name)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code
    for cell in code:
        assert not cell.outputs and cell.execution_count is None


def write_run(root: Path) -> None:
    scores = {}
    for shift, variant in enumerate(("base", "base_high_guidance", "diffusion_dpo", "spo")):
        prompts, seeds = [f"a large red circle, number {i}" for i in range(N)], range(N)
        columns = {"pickscore": 20.0 + shift, "oracle_aesthetic": 0.1 * shift, "oracle_alignment": 0.9}
        noise = np.random.default_rng(shift).normal(size=(N, 3)) / 50
        table = pd.DataFrame({"index": seeds, "prompt": prompts, "seed": seeds, **columns})
        table[list(columns)] += noise
        scores[variant] = table
        write_pictures(root / "outputs/images" / variant, prompts, 60 * shift)
        (root / "outputs/scores").mkdir(exist_ok=True)
        table.to_csv(root / f"outputs/scores/{variant}.csv", index=False)
    rows = statistics.comparisons(scores, ("base", "base_high_guidance", "diffusion_dpo"), 100, 0)
    for folder in ("metrics", "training"):
        (root / "reports" / folder).mkdir(parents=True)
    (root / "reports/comparisons.json").write_text(json.dumps(rows))
    for name in ("preference", "preference_unconditioned"):
        text = json.dumps({"accuracy": {"0": 0.8, "501": 0.7, "951": 0.5}, "n": 90})
        (root / f"reports/metrics/{name}.json").write_text(text)
    lines = "step,loss,score\n1,.7,\n2,.6,17.5\n3,.5,18\n"
    (root / "reports/training/spo.csv").write_text(lines)


def write_pictures(folder: Path, prompts: list[str], level: int) -> None:
    folder.mkdir(parents=True)
    index = io.StringIO()
    writer = csv.writer(index)
    writer.writerow(["file", "prompt", "seed"])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, prompt in enumerate(prompts):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (level, 20 * i, 90)).save(buffer, format="PNG")
            archive.writestr(f"{i:05d}.png", buffer.getvalue())
            writer.writerow([f"{i:05d}.png", prompt, i])
        archive.writestr("index.csv", index.getvalue())


@pytest.mark.smoke
def test_the_results_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel starts in the notebook's folder and finds the run by SPO_ROOT."""
    write_run(tmp_path)
    monkeypatch.setenv("SPO_ROOT", str(tmp_path))
    notebook = nbformat.read(FOLDER / "01_results.ipynb", as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert f"{N} test prompts; variants: base, base_high_guidance, diffusion_dpo, spo" in text
    assert "No mlflow.db here" in text
    shown = [o.data for o in outputs if o.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in data for data in shown) == 6
    tables = "".join(data.get("text/html", "") for data in shown)
    assert "100 %" in tables and "oracle_alignment" in tables
