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
        self.rows: dict[int, dict[str, float]] = {}
        scratch.mkdir(parents=True, exist_ok=True)

    def resume(self, iteration: int) -> None:
        """Read the rows up to a checkpoint; later iterations are run again, maybe with other values."""
        if self._mute:
            return
        known = [row for row in read_curve(self._file)[0] if row[1] <= iteration]
        lines = (json.dumps({"time": time, "step": step, **row}) for time, step, row in known)
        write_text(self._file, "".join(f"{line}\n" for line in lines))
        for _, step, row in known:
            self.rows.setdefault(step, {}).update(row)
        self._run.follow(self._file, self._file.with_name("samples"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._mute:
            return
        self.rows.setdefault(step, {}).update(metrics)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": now(), "step": step, **metrics}) + "\n")

    def write(self, path: Path | None) -> None:
        """Write the CSV, if a path is given; the stage may then remove `scratch`."""
        self._run.collect()
        if path is None:
            return
        rows = sorted(self.rows.items())
        columns = list(dict.fromkeys(k for _, row in rows for k in row))
        with atomic(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": s, **{k: f"{v:.6g}" for k, v in r.items()}} for s, r in rows)
