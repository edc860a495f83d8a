"""Step metrics of a training: line by line while it runs, a CSV for DVC's plots at the end."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.runtime.files import atomic, write_text
from spo.runtime.processes import is_main_process
from spo.tracking.records import now, read_curve


class Curve:
    """Step metrics, one row for each iteration of the training.

    They are written line by line to `scratch`, where a resumed stage finds the earlier ones and the delivery
    to MLflow finds all.
    """

    def __init__(self, run: Any, scratch: Path) -> None:
        self._run, self._file, self._mute = run, scratch / "curve.jsonl", not is_main_process()
        scratch.mkdir(parents=True, exist_ok=True)

    def resume(self, iteration: int) -> None:
        """Drop the rows after a checkpoint: their iterations are run again, maybe with other values."""
        if self._mute:
            return
        known = [row for row in read_curve(self._file)[0] if row[1] <= iteration]
        lines = (json.dumps({"time": time, "step": step, **row}) for time, step, row in known)
        write_text(self._file, "".join(f"{line}\n" for line in lines))
        self._run.follow(self._file, self._file.with_name("samples"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._mute:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), "step": step, **metrics}) + "\n")

    def write(self, path: Path | None) -> None:
        """Write the CSV, if a path is given; the stage may then remove `scratch`."""
        self._run.collect()
        if path is None:
            return
        by_step: dict[int, dict[str, float]] = {}
        for _, step, row in read_curve(self._file)[0]:
            by_step.setdefault(step, {}).update(row)
        rows = sorted(by_step.items())
        columns = list(dict.fromkeys(k for _, row in rows for k in row))
        with atomic(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": s, **{k: f"{v:.6g}" for k, v in r.items()}} for s, r in rows)
