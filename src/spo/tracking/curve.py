"""Step metrics of a stage: to MLflow at once, to a CSV for DVC at the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.runtime.files import atomic
from spo.runtime.launch import is_main_process


class Curve:
    """Step metrics: to MLflow at once, to a CSV for DVC's plots at the end.

    Kept line by line in `scratch`, so that a resumed stage ends with the whole curve; steps that are
    run again after a resume give the same values and replace the earlier ones.
    """

    def __init__(self, run: Any, scratch: Path) -> None:
        self._run, self._file, self._mute = run, scratch / "curve.jsonl", not is_main_process()
        self.rows: dict[int, dict[str, float]] = {}
        scratch.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # the last line of a killed stage may be torn
                    row = json.loads(line)
                    self.rows.setdefault(int(row.pop("step")), {}).update(row)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._mute:
            return
        self.rows.setdefault(step, {}).update(metrics)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._run.log_metrics(metrics, step=step)

    def write(self, path: Path) -> None:
        rows = sorted(self.rows.items())
        columns = list(dict.fromkeys(k for _, row in rows for k in row))
        with atomic(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": s, **{k: f"{v:.6g}" for k, v in r.items()}} for s, r in rows)
