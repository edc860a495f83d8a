"""A method is one file: what a third one touches, applied to a copy and run to the report.

`EDITS` is the whole change beside the method's own file (tests/helpers/third_method/sft.py): its section and
variant in the configuration, their values in params.yaml, and its entries in dvc.yaml.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from clones import must, run

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.smoke,
    pytest.mark.timeout(3600),
]  # the first test waits for the DAG

ALL = """
import sys
from spo import cli

for line in sys.argv[1:]:  # in one process, which takes 6 s to import all
    if code := cli.main(line.split()):
        sys.exit(f"spo {line}: {code}")
"""
FILE = Path(__file__).parents[1] / "helpers/third_method/sft.py"
SECTION = '''class Sft(Method):
    """Supervised fine-tuning."""

    lora: Lora | None
    optimizer: Optimizer
    iterations: Positive
    checkpoint_every: Positive = 50
    validation: Validation | None = None


class Align(Section):'''
EDITS = {  # file: (text, what it becomes)
    "src/spo/config/training.py": [
        ("class Align(Section):", SECTION),
        ("    spo: Spo | None\n", "    spo: Spo | None\n    sft: Sft | None\n"),
    ],
    "src/spo/config/evaluation.py": [
        ("    spo: Variant | None\n", "    spo: Variant | None\n    sft: Variant | None\n")
    ],
    "params.yaml": [
        (
            "align:\n",
            "align:\n  sft: {lora: {rank: 2, alpha: 2}, optimizer: {learning_rate: 1.0e-3}, iterations: 2}\n",
        ),
        ("generate:\n", "generate:\n  sft: {adapter: outputs/align/sft, guidance: 2.0}\n"),
    ],
    "dvc.yaml": [
        (
            "      diffusion_dpo:\n        learns_from",
            "      sft:\n"
            "        learns_from: outputs/pairs/train\n"
            "        examples: outputs/pairs/summary.json\n"
            "        code: src/spo/data\n"
            "        pairs: src/spo/data/latents.py\n"
            "        latents: pairs.latents\n"
            "      diffusion_dpo:\n        learns_from",
        ),
        (
            "      diffusion_dpo: {adapter",
            "      sft: {adapter: outputs/align/sft}\n      diffusion_dpo: {adapter",
        ),
    ],
}


@pytest.fixture
def extended(copy: Path) -> Path:
    shutil.copy(FILE, copy / "src/spo/methods/sft.py")
    for name, edits in EDITS.items():
        text = (copy / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return copy


def test_a_third_method_is_one_file_and_its_entries(extended: Path) -> None:
    stages = {line.split()[0] for line in must(extended, "dvc", "stage", "list").splitlines()}
    assert {"align@sft", "generate@sft", "score@sft"} <= stages
    commands = ["align sft --dry-run", "inputs", "align sft", "generate sft", "score sft", "report"]
    commands += ["sample circle --method sft --output sft.png"]
    done = run(extended, sys.executable, "-c", ALL, *commands)  # its code, which this process has not
    assert done.returncode == 0, done.stderr[-3000:]
    plan = done.stdout
    assert "2 updates of 4 images" in plan and "outputs/pairs/train" in plan
    assert json.loads((extended / "reports/metrics/align_sft.json").read_text())["updates"] == 2
    rows = json.loads((extended / "reports/comparisons.json").read_text())
    assert {r["method"] for r in rows} >= {"sft", "spo"}
    assert "Supervised fine-tuning" in (extended / "reports/report.html").read_text()
    card = (extended / "outputs/align/sft/README.md").read_text()
    assert "supervised fine-tuning on preferred images" in card
    assert (extended / "sft.png").exists()
