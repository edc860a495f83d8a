"""A curve has one row an iteration; a resumed stage continues from those of its checkpoint."""

import csv
from pathlib import Path

from spo.tracking.curve import Curve
from spo.tracking.records import read_curve


class Run:
    def follow(self, curve: Path, images: Path) -> None:
        self.rows = read_curve(curve)[0]  # of the processes before

    def collect(self) -> None:
        pass


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Killed after iteration 4, with the state after iteration 2; the last line is torn."""
    first, run = Curve(Run(), tmp_path), Run()
    first.log({"validation/hps": 1.0}, 0)
    for iteration in range(1, 5):
        first.log({"loss": 0.1 * iteration, "updates": iteration}, iteration)
    first.log({"validation/hps": 2.0}, 2)
    with (tmp_path / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"time": 1, "step": 5, "loss"')
    again = Curve(run, tmp_path)
    again.resume(2)
    again.log({"loss": 0.7, "updates": 2}, 3)  # without an update: another row than iteration 2's
    again.write(tmp_path / "curve.csv")
    rows = list(csv.DictReader((tmp_path / "curve.csv").open(encoding="utf-8")))
    assert [(r["step"], r["loss"], r["updates"], r["validation/hps"]) for r in rows] == [
        ("0", "", "", "1"),
        ("1", "0.1", "1", ""),
        ("2", "0.2", "2", "2"),
        ("3", "0.7", "2", ""),
    ]
    assert [step for _, step, _ in run.rows] == [0, 1, 2, 2], "the new run gets the whole curve"
    third = Curve(Run(), tmp_path)
    third.resume(3)
    third.write(tmp_path / "third.csv")
    assert (tmp_path / "third.csv").read_bytes() == (tmp_path / "curve.csv").read_bytes()


def test_without_a_checkpoint_the_curve_begins_again(tmp_path: Path) -> None:
    Curve(Run(), tmp_path).log({"loss": 0.5}, 1)
    again = Curve(Run(), tmp_path)
    again.resume(0)
    again.write(tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text(encoding="utf-8") == "step\n"
    assert (tmp_path / "curve.jsonl").read_text(encoding="utf-8") == ""
