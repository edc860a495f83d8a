"""Adapters as files."""

import json
import os
import subprocess
import sys

SAVE = """
import sys
from pathlib import Path
from spo import backbones, config
backbone = backbones.load(config.Backbone(family="sd", checkpoint=sys.argv[1]), "cpu")
backbone.add_lora(config.Lora(rank=2, alpha=2), seed=0)
backbone.save_lora(Path(sys.argv[2]))
"""


def test_equal_adapters_are_equal_files(checkpoints, tmp_path) -> None:
    """Whatever the order of hash tables in a process is: DVC names files by their bytes."""
    found = []
    for number in range(3):
        folder = tmp_path / str(number)
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run(
            [sys.executable, "-c", SAVE, checkpoints["sd"], folder],
            check=True,
            capture_output=True,
            env=environment,
        )
        found.append((folder / "pytorch_lora_weights.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]
    header = json.loads(found[0][8 : 8 + int.from_bytes(found[0][:8], "little")])
    assert header["__metadata__"] and list(header) == sorted(header)
