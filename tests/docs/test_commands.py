"""Every command that README.md and docs/ name works on the real dvc.yaml and params.yaml, or is listed with
why no test runs it."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import clones
import documents
import experiments
import pytest
import yaml
from many_runs import ARTIFACTS, GRID, KEEP

from spo import cli, config
from spo.runtime import processes

ROOT = Path(__file__).parents[2]
COMMANDS = documents.commands()
SPO = ["align@spo", "generate@spo", "score@spo"]

# beginning of a command: why no test runs it
NOT_RUN = {
    "accelerate launch": "needs GPUs: test_launchers_understand_their_options, tests/backbones/test_nodes.py",
    "dvc remote modify --local team endpointurl": "needs an S3 store: tests/tracking/test_team.py",
    "gto": "needs versions by hand: tests/docs/test_experiments.py makes the same tag",
    "docker": "needs a container engine: tests/tools/test_dockerfile.py",
    "dvc repro --pull": "needs results of a worker: tests/flows/test_deployments.py",
    "dvc exp run -S 'align.spo.gradspo={scale: 0.5, sampler_ema: 0.9}'": "as beta: test_gradspo.py",
    "dvc exp run -S seed=1": "as beta, and runs every stage that trains",
    "export": "sets the environment of what follows",
    "mlflow experiments restore": "needs an experiment that was deleted: tests/tracking",
    "mlflow gc": "needs a server",
    "mlflow runs restore": "needs a run that was deleted: tests/tracking",
    "mlflow server": "a server: tests/tracking/test_postgres.py",
    "pip install": "needs a network",
    "prefect": "a server, or needs one: tests/flows/test_schedules.py, test_deployments.py",
    "psql": "needs PostgreSQL",
    "sbatch": "needs SLURM: tests/docs/test_slurm.py",
    "torchrun": "needs machines: test_launchers_understand_their_options, tests/backbones/test_nodes.py",
}
# blocks that hold no commands, by their first words
NO_SHELL = (
    "@article",
    "import mlflow",
    "from ",
    "backbone:",
    "generate:",
    "pairs:",
    "flowchart",
    "training/loop.py:",
    "data/latents.py:",
    "#!/bin/bash",
    "flows/ ",
    "sd on NAME",
)
EXPERIMENT = [
    "dvc exp run -S align.spo.beta=20",
    "dvc exp show --only-changed --drop '.*/.*'",
    "dvc metrics diff",
    "dvc plots diff",
]
DAY = [
    "dvc remote add --local -d team /srv/dvc",
    "dvc push",
    "dvc pull",
    "dvc repro",
    "dvc exp run -S align.spo.beta=20 --name b20",
    "dvc exp show",
    "dvc metrics diff",
    "dvc plots diff HEAD",
    "dvc exp push origin b20",
    "dvc exp pull origin b20",
    "dvc exp apply b20",
    "dvc exp run --queue -S align.spo.beta=5",
    "dvc exp run --run-all --jobs 2",
]
DAILY = ("scenes", "smoke", "sd15-eval", "sdxl-overnight")  # presets; the others only at night
NODES = [
    "dvc repro preference",
    "dvc commit --force align@spo",
    "dvc cache dir --local /shared/dvc-cache",
    "dvc config --local cache.type reflink,hardlink,symlink,copy",
    "dvc config --local cache.shared group",
]
FETCH = ["dvc pull data.dvc"]  # by every clone of experiments.settled
CLEAN_UP = [
    "dvc gc --all-branches --all-tags --all-experiments --dry",
    "dvc gc --all-branches --all-tags --all-experiments",
    "dvc gc --all-branches --all-tags --all-experiments --cloud -r team --dry",
    "dvc exp remove --queue",
]


def of(*programs: str) -> list[documents.Command]:
    return [c for c in COMMANDS if c.text.split()[0] in programs and not_run(c.text) is None]


def not_run(text: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if f"{text} ".startswith(f"{start} ")), None)


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    handled = {*map(str, of("spo", "make", "pytest", "python"))}
    run = {*EXPERIMENT, *DAY, *CLEAN_UP, *GRID, *KEEP, *ARTIFACTS, *FETCH, *NODES}
    left = [c for c in COMMANDS if not (str(c) in handled or c.text in run or not_run(c.text))]
    assert list(map(str, left)) == [], "a command of the docs that no test knows"
    texts = {c.text for c in COMMANDS}
    assert run <= texts, "a test runs what the docs no longer name"
    for start in NOT_RUN:
        assert any(f"{text} ".startswith(f"{start} ") for text in texts), f"no page names {start}"


def test_every_block_is_of_commands_or_known_as_something_else() -> None:
    for where, lines in documents.blocks():
        assert documents.is_shell(lines) != lines[0].startswith(NO_SHELL), f"{where}: {lines[0]}"


def test_the_docs_are_read_whole() -> None:
    """Comments, continued lines, here-documents, several commands in a line, commands in running text."""
    texts = [c.text for c in COMMANDS]
    assert len(texts) > 70 and {c.page for c in COMMANDS} >= {"README.md", "docs/gpu.md", "docs/team.md"}
    assert "spo score --images DIR --prompts FILE --baseline DIR" in texts
    assert any(t.startswith("mlflow server") and t.endswith('mlflow.example.org"') for t in texts)
    assert "spo preset NAME" in texts and "spo sync" in texts
    assert not any("default_permission" in t or "#" in t for t in texts)


@pytest.mark.parametrize("command", of("spo"), ids=str)
def test_spo_understands_its_commands(command: documents.Command) -> None:
    words = ["scenes" if word == "NAME" else word for word in command.words[1:]]
    if words == ["--help"]:
        with pytest.raises(SystemExit) as end:
            cli.parser().parse_args(words)
        assert end.value.code == 0
        return
    arguments = cli.parser().parse_args(words)
    assert isinstance(arguments, argparse.Namespace) and callable(arguments.run)


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.words[0] in ("torchrun", "accelerate")], ids=str
)
def test_launchers_understand_their_options(command: documents.Command) -> None:
    """They start `spo` as a module, with a stage that runs in several processes."""
    launcher, module = command.words[1:], command.words.index("-m")
    if command.words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(launcher)
    else:
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(launcher[1:])
    words = [parsed.training_script, *parsed.training_script_args]
    assert parsed.module and words == command.words[module + 1 :] and words[0] == "spo"
    assert cli.parser().parse_args(words[1:]).stage in processes.STAGES


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_make_has_its_targets(command: documents.Command) -> None:
    done = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", of("pytest"), ids=str)
def test_pytest_has_its_files_and_markers(command: documents.Command) -> None:
    words = command.words[1:]
    assert words
    if "-m" in words:
        assert f'"{words[words.index("-m") + 1]}: ' in (ROOT / "pyproject.toml").read_text()
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists()


@pytest.mark.smoke  # Prefect takes seconds to import
@pytest.mark.parametrize("command", of("python"), ids=str)
def test_scripts_have_their_options(
    command: documents.Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, which has most of what they import."""
    is_module = command.words[1] == "-m"
    script, *words = command.words[2:] if is_module else command.words[1:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    start = runpy.run_module if is_module else runpy.run_path
    with pytest.raises(SystemExit) as end:
        start(script, run_name="__main__")
    assert end.value.code == 0
    options = capsys.readouterr().out
    for option in (word for word in words if word.startswith("-")):
        assert option in options


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> experiments.Experiment:
    return experiments.settled(tmp_path_factory)


@pytest.mark.smoke
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


@pytest.mark.nightly
@pytest.mark.smoke
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


@pytest.mark.smoke
@pytest.mark.parametrize(
    "preset",
    [
        name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly)
        for name in config.preset_names()
    ],
)
def test_dvc_can_run_every_preset(first: experiments.Experiment, preset: str) -> None:
    params = first.folder / "params.yaml"
    before = params.read_bytes()
    clones.must(first.folder, "spo", "preset", preset, "--force")
    assert yaml.safe_load(params.read_text())["name"] == preset
    planned = first("dvc repro --dry --force")
    assert planned.count("Running stage") == len(first.names) == 23
    params.write_bytes(before)


@pytest.mark.nightly
@pytest.mark.smoke
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


@pytest.mark.nightly
@pytest.mark.smoke
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
    import csv

    table = experiment("dvc exp show --csv --no-pager 2>/dev/null")
    return list(csv.DictReader(table.splitlines()))
