"""Which of the large libraries a command imports before it has something for them to do.

Each takes .5 to 3 s of processor time. A command that only refuses a mistake, or prints, needs none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
def status(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code
for arguments in json.loads(sys.argv[1]):
    code = status(arguments)
    print("\\n" + json.dumps([code, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def imported(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, set[str]]]:
    """Return the exit status of each command of one process, and the large libraries imported by then."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(commands), json.dumps(LARGE)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [(status, set(found)) for status, found in lines]


def test_help_mistakes_and_presets_import_none(tmp_path: Path) -> None:
    commands = [("--help",), ("align", "--help"), ("align", "nonsense"), ("preset", "sd15")]
    assert imported(tmp_path, *commands) == [(0, set()), (0, set()), (2, set()), (0, set())]


def test_a_mistake_in_params_yaml_is_found_before_any_import(tmp_path: Path) -> None:
    text = config.preset("smoke")
    assert "seed: 0\n" in text
    (tmp_path / "params.yaml").write_text(text.replace("seed: 0\n", "seed: much\n", 1))
    variants = {"align": ["spo"], "generate": ["base"], "score": ["base"], "sample": ["a prompt"]}
    commands = [(name, *variants.get(name, [])) for name in (*cli.STAGES, "sample")]
    assert imported(tmp_path, *commands) == [(2, set())] * len(commands)


def test_repro_with_a_mistake_in_params_yaml_does_not_ask_dvc(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("nonsense: 1\n")
    assert imported(tmp_path, ("repro",)) == [(2, set())]


def test_a_repro_with_nothing_to_do_imports_dvc_and_mlflow_but_no_torch(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    (tmp_path / "params.yaml").write_text(config.preset("smoke"))
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    ((status, found),) = imported(tmp_path, ("repro",))
    assert status == 0 and {"dvc", "mlflow"} <= found
    assert found.isdisjoint(
        {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "prefect"}
    )
