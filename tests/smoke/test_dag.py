"""The whole DAG, with the smoke preset, in a temporary clone: what a newcomer's first command does."""

from __future__ import annotations

import compileall
import json
import subprocess
from pathlib import Path

import clones
import pytest
import yaml
from clones import ROOT, must, run

from spo import config
from spo.tracking import dvc_lock

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(3600)]  # the first test waits for the DAG
DAILY = ("scenes", "smoke", "sd15-eval", "sdxl-overnight")  # presets; the others only at night


def test_every_variant_is_compared_on_every_metric(clone: Path) -> None:
    rows = json.loads((clone / "reports/comparisons.json").read_text())
    seen = {(r["method"], r["baseline"], r["metric"]) for r in rows}
    metrics = {"pickscore", "hps", "aesthetic", "oracle_aesthetic", "oracle_alignment"}
    assert {("spo", b, m) for b in ("base", "base_high_guidance", "diffusion_dpo") for m in metrics} <= seen
    assert {("diffusion_dpo", "base", m) for m in metrics} <= seen
    for row in rows:
        assert row["n"] == 24
        assert row["ci_low"] <= row["mean_difference"] <= row["ci_high"]
        assert row["mean_difference"] == pytest.approx(row["mean_method"] - row["mean_baseline"], abs=1e-6)


def test_the_page_stands_alone(clone: Path) -> None:
    page = (clone / "reports/report.html").read_text()
    assert "data:image/png;base64" in page
    assert "<script src" not in page and 'href="http' not in page
    assert "left of" in page or "above" in page  # a prompt of a grid


def test_a_second_repro_does_nothing(clone: Path) -> None:
    assert "Data and pipelines are up to date" in must(clone, "dvc", "repro")


def test_what_python_and_editors_leave_beside_the_code_changes_no_stage(clone: Path) -> None:
    """The shipped dvc.lock is of code without bytecode, which Python writes when a stage first runs."""
    assert compileall.compile_dir(clone / "src/spo", quiet=2)
    left = ["config/.DS_Store", "config/base.py~", "config/.base.py.swp", "data/.ipynb_checkpoints/pairs.py"]
    for name in left:
        file = clone / "src/spo" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("left")
    assert list((clone / "src/spo/config/__pycache__").glob("*.pyc"))
    assert json.loads(run(clone, "dvc", "status", "--json").stdout) == {}
    for name in left:
        (clone / "src/spo" / name).unlink()


def test_dvc_shows_metrics_and_plots(clone: Path) -> None:
    assert "spo.gain" in must(clone, "dvc", "metrics", "show")
    assert "plots" in must(clone, "dvc", "plots", "show")


def test_what_a_person_compares_fits_a_screen(clone: Path) -> None:
    """The same numbers for DVC and for the parent run of MLflow."""
    import mlflow

    own = ("gain", "low", "high", "win_rate", "alignment", "seconds")
    names = {f"{method}/{key}" for method in ("spo", "diffusion_dpo", "lpo") for key in own} | {"accuracy"}
    (shown,) = json.loads(must(clone, "dvc", "metrics", "show", "--json"))[""]["data"].values()
    assert {*dvc_lock.read_metrics(clone / "reports/metrics/report.json")} == names and shown["data"]
    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    assert {*parent.data.metrics} == names
    (report,) = (r for r in runs if r.info.run_name == "report")
    assert "spo_vs_base/hps/difference" in report.data.metrics, "all comparisons stay with the report's run"


def test_a_change_of_the_preference_model_does_not_rerun_diffusion_dpo(clone: Path) -> None:
    text = (clone / "params.yaml").read_text()
    params = yaml.safe_load(text)
    params["preference"]["optimizer"]["weight_decay"] += 0.1
    (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    status = json.loads(run(clone, "dvc", "status", "--json").stdout)
    (clone / "params.yaml").write_text(text)
    assert "preference" in status
    assert "align@diffusion_dpo" not in status and "generate@diffusion_dpo" not in status


def test_a_changed_key_reaches_its_stage_and_those_after_it_alone(clone: Path) -> None:
    """What `dvc exp run -S align.spo.beta=20` would run: tests/docs/test_dvc_commands.py does, by night."""
    text = (clone / "params.yaml").read_text()
    params = yaml.safe_load(text)
    params["align"]["spo"]["beta"] += 10
    (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    status = json.loads(run(clone, "dvc", "status", "--json").stdout)
    (clone / "params.yaml").write_text(text)
    assert {*status} == {"inputs", "align@spo", "report"}, "the page shows all settings"
    reached = {*status} - {"inputs"}  # whose files hold no beta
    stages = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    for _ in stages:
        made = tuple(out["path"] for name in reached for out in stages[name]["outs"])
        reached |= {n for n, s in stages.items() if any(dep["path"].startswith(made) for dep in s["deps"])}
    assert reached == {"align@spo", "generate@spo", "score@spo", "report"}


@pytest.mark.parametrize(
    "preset",
    [
        name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly)
        for name in config.preset_names()
    ],
)
def test_dvc_can_run_every_preset(clone: Path, preset: str) -> None:
    params = clone / "params.yaml"
    before = params.read_bytes()
    must(clone, "spo", "preset", preset, "--force")
    assert yaml.safe_load(params.read_text())["name"] == preset
    planned = must(clone, "dvc", "repro", "--dry", "--force")
    stages = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    assert planned.count("Running stage") == len(stages) == 23
    params.write_bytes(before)


def test_every_stage_is_a_run_under_one_parent(clone: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    parents = {r.data.tags.get("mlflow.parentRunId") for r in runs} - {None}
    assert len(parents) == 1
    names = {r.info.run_name for r in runs if "mlflow.parentRunId" in r.data.tags}
    for stage in ("prompts", "pairs", "preference", "align-spo", "generate-base", "score-spo", "report"):
        assert stage in names, f"{stage} is not among {sorted(names)}"
    assert {r.info.run_name: r.info.status for r in runs if r.info.status != "FINISHED"} == {}
    (spm,) = (r for r in runs if r.info.run_name == "preference")


def test_sample_draws_a_picture_and_refuses_unknown_words(clone: Path) -> None:
    prompt = "a large red circle above a small blue star on sand"
    must(clone, "spo", "sample", prompt, "--method", "spo", "--output", "picture.png")
    assert (clone / "picture.png").stat().st_size > 1000
    refused = clones.spo(clone, "sample", "a large red giraffe on sand")
    assert refused.returncode == 2
    assert "giraffe" in refused.stderr and "Traceback" not in refused.stderr


def test_missing_inputs_say_what_to_do(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((clone / "params.yaml").read_text())
    refused = clones.spo(tmp_path, "align", "spo")
    assert refused.returncode == 2
    assert "make repro" in refused.stderr and "Traceback" not in refused.stderr


def test_a_damaged_seed_remote_is_refused(clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "damaged"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(other)], check=True)
    blob = max((p for p in (other / ".dvc-seed").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    assert run(other, "dvc", "pull", "--quiet", "data.dvc").returncode != 0


def test_the_commands_of_the_readme_work_on_a_finished_run(copy: Path) -> None:
    """In its order, on what `dvc repro` left: params.yaml and dvc.lock as DVC writes them."""
    params = (copy / "params.yaml").read_text()
    gate = "  improves: [pickscore]\n  holds: {hps: 0.5, aesthetic: 0.05}\n"
    assert gate in params  # whatever two updates made of it:
    (copy / "params.yaml").write_text(params.replace(gate, "  improves: []\n  holds: {pickscore: 1.0e+6}\n"))
    prompts = copy / "outputs/prompts/test.txt"
    commands = [
        "align spo --dry-run",
        "keep",
        "report",
        "register",
        "sample circle --model champion --output drawn.png",
        "publish outputs/align/spo --to published",
        f"score --images outputs/images/spo --prompts {prompts} --baseline outputs/images/base",
        "sync",
    ]
    said = "".join(must(copy, "spo", *command.split()) for command in commands)
    saved = json.loads((copy / "reports/seeds/0.json").read_text())
    assert saved["seed"] == 0 and saved["comparisons"]
    assert "champion" in said and (copy / "drawn.png").exists()
    card = (copy / "published/README.md").read_text()
    assert "| pickscore |" in card and str(copy.parent) not in card
    assert "diffusion_dpo.win_rate" in must(copy, "dvc", "metrics", "diff", "--all")
