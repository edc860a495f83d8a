"""What `spo repro` prints: lines of stages, on a terminal a live line, the plan, the forecast, the result."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from tqdm import tqdm

from spo.commands import forecast, repro
from spo.commands.progress import BAR, Progress, console

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(text: str, code: int = 0) -> Any:
    return SimpleNamespace(stdout=io.StringIO(text), wait=lambda: code)


def followed(text: str, code: int = 0, **options: Any) -> tuple[str, Progress]:
    """What is printed of one stage of two, and what followed it."""
    out = io.StringIO()
    progress = Progress(2, Console(file=out, highlight=False, markup=False, **options))
    assert progress.follow("align@spo", process(text, code)) == code
    return out.getvalue(), progress


def bar(unit: str, rate: float) -> str:
    return tqdm.format_meter(12, 48, 12 / rate, prefix="align.spo", unit=unit, ncols=80)


def test_a_stage_is_a_line_when_it_begins_and_one_when_it_ends_and_the_rest_is_in_its_file() -> None:
    text = "Running stage 'align@spo':\n> spo align spo\n" + bar("iteration", 0.1) + "\n"
    printed, progress = followed(text)
    assert printed == "00:00 align@spo begins\n00:00 align@spo done (0 s; 1 of 2)\n"
    assert Path(".spo/logs/align@spo.log").read_text(encoding="utf-8") == text
    assert list(progress.seconds) == ["align@spo"]


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ("Stage 'align@spo' didn't change, skipping", "is unchanged"),
        ("Stage 'align@spo' is cached - skipping run, checking out outputs", "is restored from DVC's cache"),
    ],
)
def test_a_stage_that_dvc_does_not_run_is_said_and_gives_no_time(said: str, end: str) -> None:
    printed, progress = followed(f"{said}\n")
    assert printed.splitlines()[1] == f"00:00 align@spo {end} (0 s; 1 of 2)" and progress.seconds == {}


def test_of_a_failure_the_last_lines_are_printed_without_progress_bars() -> None:
    lines = [f"line {i}" for i in range(20)] + [
        bar("image", 2),
        "",
        "spo: no such file: [a]",
        "ERROR: failed",
    ]
    printed, progress = followed("\n".join(lines) + "\n", code=2)
    assert printed.splitlines()[1] == "00:00 align@spo failed after 0 s; .spo/logs/align@spo.log ends with"
    shown = [f"align@spo | {line}" for line in (*lines[14:20], *lines[-2:])]
    assert printed.splitlines()[2:] == shown and progress.seconds == {}


@pytest.mark.parametrize(("rate", "unit"), [(0.1, "iteration"), (7.0, "image"), (0.5, "pair")])
def test_a_progress_bar_is_read_as_tqdm_draws_it(rate: float, unit: str) -> None:
    found = BAR.match(bar(unit, rate))
    assert found and (found[2] or found[3], found[1]) == (unit, "12/48")
    assert BAR.match("  0%|          | 0/48 [00:00<?, ?iteration/s]")
    assert not BAR.match("loss 5% lower | 3/4 [of all]")


@pytest.mark.parametrize("width", [20, 100])
def test_on_a_terminal_one_live_line_shows_the_stages_that_run_cut_to_its_width(width: int) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    progress = Progress(2, terminal)

    def lines() -> Any:
        yield bar("iteration", 0.1) + "\n"
        progress.live.refresh()
        yield "done\n"

    with progress.live:
        progress.follow("align@spo", SimpleNamespace(stdout=lines(), wait=lambda: 0))  # type: ignore[arg-type]
    live = re.findall(r"00:00 align@spo[^\r\n\x1b]*", out.getvalue())
    assert "00:00 align@spo iteration 12/48"[: width - 1] in {line.rstrip("…")[: width - 1] for line in live}
    assert max(map(len, live)) <= max(width, len("00:00 align@spo done (0 s; 1 of 2)"))


def test_what_is_no_terminal_gets_plain_lines_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    out = console()
    out.print("word [bold] 12 " * 20)
    assert capsys.readouterr().out == "word [bold] 12 " * 20 + "\n"


def test_the_plan_names_what_runs_and_what_is_up_to_date() -> None:
    run = ["preference", "align@spo", "align@lpo", "report"]
    lines = repro.plan("scenes", run, ["inputs", "score@base"], 600)
    assert lines == [
        "scenes: 4 stages to run, about 9 to 16 min here",
        "  run: preference, align (spo, lpo), report",
        "  up to date: inputs, score (base)",
    ]
    assert repro.plan("own", run, [], None)[0].endswith("for how long is not known before a first run")


@pytest.mark.parametrize(
    ("seconds", "text"), [(10, "9 to 16 s"), (90, "81 to 144 s"), (120, "2 to 3 min"), (0.1, "1 to 1 s")]
)
def test_a_forecast_is_a_range(seconds: float, text: str) -> None:
    assert forecast.text(seconds) == text


def test_the_work_of_stages_is_known_when_that_of_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "SHIPPED", Path("shipped.json"))
    Path("shipped.json").write_text(json.dumps({"scenes": {"pairs": 100, "report": 50}}), encoding="utf-8")
    assert forecast.known("scenes", ["pairs"]) == {"pairs": 100}
    assert (
        forecast.known("scenes", ["pairs", "align@spo"]) is None and forecast.known("own", ["pairs"]) is None
    )
    forecast.remember("scenes", {"align@spo": 900.4, "pairs": 120})
    forecast.remember("own", {"pairs": 7})
    assert forecast.known("scenes", ["report", "pairs", "align@spo"]) == {
        "report": 50,
        "pairs": 120,
        "align@spo": 900,
    }, "what ran here counts more than what is shipped"
    assert forecast.known("own", ["pairs"]) == {"pairs": 7}


def test_the_shipped_work_is_that_of_every_stage_of_the_default_and_the_smoke_experiment() -> None:
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))
    stages = set(lock["stages"])
    assert forecast.known("scenes", stages) and forecast.known("smoke", stages)


def test_the_result_is_the_verdict_the_cost_and_the_page() -> None:
    ends = {"mean_difference": 0.28, "ci_low": 0.267, "ci_high": 0.293, "win_rate": 1.0, "n": 256}
    row = {"method": "spo", "baseline": "base", "metric": "oracle_aesthetic", "mean_method": 0.8, **ends}
    assert list(repro._result()) == [], "without a page there is no result"
    Path("reports/metrics").mkdir(parents=True)
    Path("reports/report.html").touch()
    Path("reports/comparisons.json").write_text(json.dumps([row]), encoding="utf-8")
    numbers = {"spo": {"gain": 0.28, "seconds": 695.6}, "lpo": {"gain": 0.1}, "accuracy": 0.59}
    Path("reports/metrics/report.json").write_text(json.dumps(numbers), encoding="utf-8")
    found, cost, page = repro._result()
    assert found == "By the oracle's aesthetics, SPO beats the base model (+0.280, +0.267 to +0.293)."
    assert cost == "Training took 696 s for SPO, preference models included."
    assert page.startswith("reports/report.html: ")
