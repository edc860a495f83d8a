"""Which of the large libraries a command imports before it has something for them to do.

Each takes .5 to 3 s of processor time. A command that only refuses a mistake, or prints, needs none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spo import cli, config

LARGE = (
    *(
        "accelerate",
        "diffusers",
        "dvc",
        "matplotlib",
        "mlflow",
        "numpy",
        "open_clip",
        "pandas",
        "peft",
        "PIL",
    ),
    *("prefect", "pyarrow", "scipy", "sklearn", "sqlalchemy", "torch", "torchvision", "transformers"),
)
PROGRAM = """
import json, sys
from spo import cli
try:
    status = cli.main(json.loads(sys.argv[1]))
except SystemExit as end:
    status = end.code
print("\\n" + json.dumps([status, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def imported(folder: Path, *arguments: str) -> tuple[int, set[str]]:
    """Return the exit status of a command, and the large libraries that it has imported."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps(LARGE)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    status, found = json.loads(done.stdout.splitlines()[-1])
    return status, set(found)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("align", "--help"), ("align", "nonsense"), ("preset", "sd15")]
)
def test_help_mistakes_and_presets_import_none(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, found = imported(tmp_path, *arguments)
    assert found == set() and status == (2 if "nonsense" in arguments else 0)


@pytest.mark.parametrize("stage", [*cli.STAGES, "sample"])
def test_a_mistake_in_params_yaml_is_found_before_any_import(tmp_path: Path, stage: str) -> None:
    text = config.preset("smoke")
    assert "seed: 0\n" in text
    (tmp_path / "params.yaml").write_text(text.replace("seed: 0\n", "seed: much\n", 1))
    variants = {"align": ["spo"], "generate": ["base"], "score": ["base"], "sample": ["a prompt"]}
    assert imported(tmp_path, stage, *variants.get(stage, [])) == (2, set())


def test_repro_with_a_mistake_in_params_yaml_does_not_ask_dvc(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("nonsense: 1\n")
    assert imported(tmp_path, "repro") == (2, set())


def test_a_repro_with_nothing_to_do_imports_dvc_and_mlflow_but_no_torch(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (tmp_path / "params.yaml").write_text(config.preset("smoke"))
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    status, found = imported(tmp_path, "repro")
    assert status == 0 and {"dvc", "mlflow"} <= found
    assert found.isdisjoint(
        {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "prefect"}
    )
