"""Every command that README.md and docs/ name works on the real dvc.yaml and params.yaml, or is listed with
why no test runs it."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from dvc_commands import CLEAN_UP, DAY, EXPERIMENT, FETCH, NODES
from many_runs import ARTIFACTS, GRID, KEEP

from spo import cli
from spo.runtime import processes

ROOT = Path(__file__).parents[2]
COMMANDS = documents.commands()

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


@pytest.mark.smoke  # they import more than torch
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
