"""DVC's commands of README.md and docs/ work on the real dvc.yaml and params.yaml; stages are stand-ins.

Their effect on the stages is seen in tests/smoke/test_dag.py too, by DVC's status.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import time
from pathlib import Path

import experiments
import pytest
from dvc_commands import CLEAN_UP, DAY, EXPERIMENT, NODES

from spo import config

pytestmark = [pytest.mark.nightly, pytest.mark.smoke]

ROOT = Path(__file__).parents[2]
SPO = ["align@spo", "generate@spo", "score@spo"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> experiments.Experiment:
    return experiments.settled(tmp_path_factory)


def test_readme_varies_an_experiment(first: experiments.Experiment) -> None:
    run, show, metrics, plots = EXPERIMENT
    with experiments.restored(first):
        assert first.stages(run) == ["inputs", *SPO, "report"]
        assert config.load(first.folder / "params.yaml").align.spo.beta == 20
        assert "align.spo" in first(f"{show} --csv") and first(show)
        changed = json.loads(first(f"{metrics} --json"))
        assert set(changed) == {"reports/metrics/report.json"} and first(metrics)
        assert "index.html" in first(plots)
        assert first.stages() == [], "all is up to date after an experiment"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("align.spo.optimizer.learning_rate=1e-5", ["inputs", *SPO, "report"]),
        ("generate.base.guidance=3", ["inputs", "generate@base", "score@base", "report"]),
        ("report.grid_prompts=4", ["inputs", "report"]),
        ("registry.method=diffusion_dpo", []),
        ("tracking=http://127.0.0.1:5000", []),
    ],
)
def test_an_experiment_runs_what_its_key_touches(
    first: experiments.Experiment, change: str, expected: list[str]
) -> None:
    with experiments.restored(first):
        assert first.stages(f"dvc exp run -S {change}") == expected


@pytest.mark.timeout(3600)
def test_a_team_s_day(first: experiments.Experiment, tmp_path: Path) -> None:
    """Two clones, a remote for both, an experiment handed over, a queue, and the clean-up."""
    (add, push, pull, repro, vary, show, metrics, plots, hand, take, apply, queue, all_queued) = DAY
    first(f"git init -q --bare {tmp_path}/origin.git && git remote set-url origin {tmp_path}/origin.git")
    first("git push -q -u origin HEAD:main")
    add = add.replace("/srv/dvc", str(tmp_path / "shared"))
    first(add)
    first(push)
    subprocess.run(
        ["git", "clone", "-qb", "main", f"{tmp_path}/origin.git", str(tmp_path / "two")], check=True
    )
    second = experiments.Experiment(tmp_path / "two")
    (second.folder / ".dvc-seed").symlink_to(ROOT / ".dvc-seed")  # which git brings, but not in `settled`
    second(add)
    second(pull)
    assert second.stages(repro) == [], "nothing is left to do"
    assert second.stages(vary) == ["inputs", *SPO, "report"]
    assert "b20" in second(f"{show} --csv") and second(show)
    assert "align_spo" in second(metrics)
    assert "index.html" in second(plots)
    second(hand)
    first(take)
    first(apply)
    assert "beta: 20" in (first.folder / "params.yaml").read_text()
    assert first.stages(repro) == [], "the experiment comes with its outputs"
    first(queue)
    assert {*SPO} <= {*first.stages(all_queued)}
    first("dvc queue stop --kill")  # the workers would wait a minute for more
    assert "beta: 20" in (first.folder / "params.yaml").read_text(), "the workspace stays as it was"
    assert "5" in {row["align.spo.beta"] for row in experiment_rows(first)}

    try_out, collect, try_out_cloud, forget = CLEAN_UP
    assert "objects" in first(try_out, "y\n")
    first(collect, "y\n")
    assert first.stages(repro) == [], "what experiments and branches need stays"
    first(try_out_cloud, "y\n")
    wait_for_workers(first)
    first(queue)
    assert "Removed" in first(forget)


def test_a_stage_that_several_nodes_ran_is_recorded(first: experiments.Experiment, tmp_path: Path) -> None:
    before, commit, cache, *settings = NODES
    local = first.folder / ".dvc/config.local"
    kept = local.read_text() if local.exists() else None
    with experiments.restored(first):
        params = first.folder / "params.yaml"
        params.write_text(
            re.sub(r"beta: \d+\n", "beta: 30\n", params.read_text(), count=1)
        )  # SPO's, the first
        assert config.load(params).align.spo.beta == 30
        assert first.stages(before) == ["inputs"]
        assert json.loads(first("dvc status align@spo --json"))["align@spo"]
        first(commit)
        assert "align@spo" not in json.loads(first("dvc status align@spo --json"))
    for command in (cache.replace("/shared", str(tmp_path)), *settings):
        first(command)
    assert f"dir = {tmp_path}/dvc-cache" in local.read_text() and "shared = group" in local.read_text()
    local.unlink() if kept is None else local.write_text(kept)


def wait_for_workers(experiment: experiments.Experiment) -> None:
    """The workers of `--run-all` live on for a while and would take what is queued next."""
    experiment("dvc queue stop --kill")
    end = time.monotonic() + 600
    while "0 active, 0 idle" not in (status := experiment("dvc queue status")):
        assert time.monotonic() < end, status
        time.sleep(1)


def experiment_rows(experiment: experiments.Experiment) -> list[dict[str, str]]:
    table = experiment("dvc exp show --csv --no-pager 2>/dev/null")
    return list(csv.DictReader(table.splitlines()))
