"""Step metrics of a stage: to MLflow at once, to a CSV for DVC at the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.runtime.files import atomic
from spo.runtime.processes import is_main_process


class Curve:
    """Step metrics: to MLflow at once, to a CSV for DVC's plots at the end.

    A step is an iteration of the training, and has one row. Kept line by line in `scratch`, so that a resumed
    stage ends with the whole curve.
    """

    def __init__(self, run: Any, scratch: Path) -> None:
        self._run, self._file, self._mute = run, scratch / "curve.jsonl", not is_main_process()
        self.rows: dict[int, dict[str, float]] = {}
        scratch.mkdir(parents=True, exist_ok=True)

    def resume(self, iteration: int) -> None:
        """Take over the rows up to a checkpoint; those beyond it are run again, maybe with other values.

        The run gets them too: it is another one than that of the process that was stopped.
        """
        if self._mute or not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines()
        known = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn by a kill
        known = [row for row in known if row["step"] <= iteration]
        with atomic(self._file) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")
        for row in known:
            step = row.pop("step")
            self.rows.setdefault(step, {}).update(row)
            self._run.log_metrics(row, step=step)

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
