"""The ablations of docs/results.md: each a DVC experiment from the default run, in a folder of its own.

`python -m tools.ablations` prints their rows; on two cores it takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from spo.evaluation.verdict import interval, name

METRICS = ("oracle_aesthetic", "oracle_alignment", "pickscore", "hps", "aesthetic")
SETTINGS = {  # name of the experiment: (row, method, changes to params.yaml)
    "spo-unconditioned": (
        "SPO, preference model without the step",
        "spo",
        ["preference.step_condition=false"],
    ),
    "spo-clean-only": (
        "SPO, preference model trained on clean images only",
        "spo",
        ["preference.step_condition=false", "preference.noised=false"],
    ),
    "diffusion-dpo-long": (
        "Diffusion-DPO, 6,000 updates",
        "diffusion_dpo",
        [
            "align.diffusion_dpo.iterations=6000",
            "align.diffusion_dpo.validation.every=300",
            "align.diffusion_dpo.validation.stop=false",
        ],
    ),
}


def row(title: str, method: str, comparisons: Iterable[Mapping[str, Any]]) -> str:
    """A row of the table: a method's mean differences from the base, with their intervals."""
    own = {r["metric"]: r for r in comparisons if (r["method"], r["baseline"]) == (method, "base")}
    return f"| {title} | {' | '.join(interval(own[metric]) for metric in METRICS)} |"


def main() -> None:
    from dvc.api import read

    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"| over the base | {' | '.join(map(name, METRICS))} |\n|---|{'---|' * len(METRICS)}")
    for experiment, (title, method, changes) in SETTINGS.items():
        options = [option for change in changes for option in ("--set-param", change)]
        subprocess.run(
            [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", experiment, *options], check=True
        )
        print(row(title, method, json.loads(read("reports/comparisons.json", rev=experiment))), flush=True)


if __name__ == "__main__":
    main()
