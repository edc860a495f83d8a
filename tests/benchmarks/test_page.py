"""docs/benchmarks.md is what the measurements give, and the page in the repository has all of it."""

from pathlib import Path

from benchmarks.growth import Curve
from benchmarks.measure import Result
from benchmarks.page import Measured, render

ROOT = Path(__file__).parents[2]


def result(name: str, ratio: float) -> Result:
    return Result(
        name, "the other", "pair", 5, 1000 * ratio, 1000, ratio, ratio - 0.1, ratio + 0.1, ratio, 1e-6
    )


def measured() -> Measured:
    memory = {
        "ours": {"loaded": 900.0, "peak": 1050.0, "beyond": 150.0},
        "official": {"loaded": 900.0, "peak": 1200.0, "beyond": 300.0},
    }
    curve = Curve("prompts", "rollout", (4, 8), (1.0, 2.0), (10.0, 10.0))
    results = [
        result("training step of 16 pairs", 0.4),
        result("iteration", 0.75),
        result("scoring: hps", 0.2),
    ]
    return Measured(results, memory, [curve], "Small.")


def test_tables_and_targets() -> None:
    page = render(measured())
    expected = (
        "| iteration | the other | 750 ms per pair | 1,000 ms | **0.75** (0.65 to 0.85) | 0.75 | 5 | 1e-06 |",
        "| ours | 900 | 1050 | 150 |",
        "beyond the loaded models: **0.50**",
        "| training step of 16 pairs | at most 0.45 | 0.40 | met |",
        "| iteration | at most 0.70 | 0.75 | missed |",
        "| scoring: hps | 5 times | 5.0 | met |",
        "| memory | at most 0.60 | 0.50 | met |",
        "| prompts | rollout | 4, 8 | 1.00, 2.00 | 1.00 | 10, 10 | 0.00 |",
        "No figure of a GPU exists",
    )
    for row in expected:
        assert row in page


def test_the_page_in_the_repository_is_of_this_script() -> None:
    """Its fixed text is the file's, and its headings are those of the script."""
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert page.endswith((ROOT / "benchmarks/text.md").read_text())
    headings = [line for line in render(measured()).splitlines() if line.startswith("#")]
    assert [line for line in page.splitlines() if line.startswith("#")] == headings
