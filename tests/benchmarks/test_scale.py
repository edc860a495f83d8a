"""The figures of docs/scale.md that are counted, not timed."""

from __future__ import annotations

from pathlib import Path

from benchmarks import scale

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text()


def test_the_page_has_the_sizes_of_the_real_models() -> None:
    rows = scale.weights()
    assert [row[0] for row in rows][1::2] == ["sd15, full", "sdxl, full"]
    for _, parameters, update, checkpoint in rows:
        shown = next(line for line in PAGE.splitlines() if f"| {parameters} |" in line)
        for value in (update, checkpoint):
            number = float(value.replace(",", ""))
            assert f"| {number:,.1f} |" in shown or f"| {number:,.0f} |" in shown


def test_an_update_sends_its_gradients_once_and_a_few_numbers() -> None:
    _, moved, gradients, calls = (int(value.replace(",", "")) for value in scale.traffic(1000))
    assert gradients == 4000 and moved - gradients <= 100 and calls <= 8
