"""The code of docs/python.md runs as it is in a repository whose stages have run."""

from __future__ import annotations

import re
from pathlib import Path

import in_fork
import pytest
from clones import ROOT, environment

CODE = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL))


@pytest.mark.smoke
@pytest.mark.timeout(3600)  # it may be the first that waits for the DAG
def test_it_scores_trains_and_compares(copy: Path) -> None:
    (copy / "page.py").write_text(CODE)
    done = in_fork.python(copy, "page.py", variables=environment(copy))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\[-?\d+\.\d+\]", lines[0]) and lines[1] == "my_adapter"
    assert (copy / "my_adapter/pytorch_lora_weights.safetensors").exists()
    assert {"pickscore", "hps", "aesthetic"} <= {line.split()[0] for line in lines[2:] if line.strip()}
