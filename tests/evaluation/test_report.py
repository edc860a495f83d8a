"""The page and its figures, from a small run folder with known values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from report_run import PAIRS, PROMPTS, SHIFT, N, Tracked, params, prepared, rewrite_prompts, write_run

from spo import config
from spo.evaluation import results
from spo.stages import report as stage


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """A run in the working folder; what its report stage tracks."""
    return prepared(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tracked]:
    """The folder of a run with its report, and what was tracked."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        run = prepared(folder, patch)
        stage.run(params(tracking="http://me:secret@tracker:5000"))
    return folder / "reports", run


@pytest.fixture
def finished(first: tuple[Path, Tracked], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reports of a run, in whose folder the test runs; they are only read."""
    monkeypatch.chdir(first[0].parent)
    return first[0]


@pytest.fixture
def page(finished: Path) -> str:
    return (finished / "report.html").read_text(encoding="utf-8")


def test_the_page_says_when_and_why_a_training_ended(page: str) -> None:
    assert page.count("Ended at iteration") == 1
    assert "<p>Ended at iteration 58: it gained no more.</p>" in page


def test_the_page_has_the_figures(page: str) -> None:
    for text in (
        "By the oracle&#39;s aesthetics, SPO beats the base model (+0.25000, +0.25000 to +0.25000), Diff",
        "Against the base model, it raises PickScore and lowers alignment with the prompt.",
        "Training took 120 s for SPO and 60 s for Diffusion-DPO",
        "Beware: with SPO, other scores rose while alignment with the prompt fell (against Base).",
        "+2.00000",  # SPO's PickScore over base: the noise is shared, so the interval has no width
        "100.0 %",
        "81.2",  # the SPM's accuracy at t = 0
        "The first 3 test prompts",
        "13,600",
        "0123456789ab",
        "trained on images of the same renderer",
        "0.0903",
        f"iterations: {params().align.spo.iterations}",
        "Before training",
        "After 58 updates",
        "Scores of validation images of spo",
        "another value of align.spo.beta",
    ):
        assert text in page, text
    assert page.count('<tr class="') == PAIRS * (1 + 3)  # pairs of variants: a heading and three metrics
    assert page.count("<td><img") == 3 * len(SHIFT)
    assert "suites of prompts" not in page and "not measured separately" not in page


def rows(page: str) -> list[list[str]]:
    """The rows of all tables, each as the text of its cells."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in found]


def test_a_table_has_the_verdict_on_every_pair_of_variants(page: str) -> None:
    metrics, verdicts = ["PickScore", "Oracle: aesthetics", "Oracle: alignment"], rows(page)
    assert verdicts[0] == ["", *metrics]
    assert verdicts[1] == ["SPO − Base", "▲ better", "▲ better", "▼ worse"]
    assert verdicts[PAIRS] == ["Base, more guidance − Base", "▲ better", "▲ better", "· unclear"]


def test_another_seed_is_shown_beside_this_one(page: str) -> None:
    cells = ["+2.000", "+1.500", "+1.750", "0.354"]  # differences of 2 and 1.5
    assert ["", "seed 0", "seed 1", "mean", "standard deviation"] in rows(page)
    assert ["SPO − Base: PickScore", *cells] in rows(page)


def test_the_page_stands_alone_and_escapes_prompts(page: str) -> None:
    assert "alert(1)" in page
    assert "<script" not in page.lower()
    assert "http" not in page and "secret" not in page
    assert re.findall(r'href="([^"]*)', page) == ["#comparisons", "gallery.html"]
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)


JAVASCRIPT = "<script>document.title = 'stolen'</script><img src=x onerror=\"document.title = 'stolen'\">"


@pytest.mark.nightly
@pytest.mark.services
def test_a_browser_runs_nothing_of_a_prompt(
    tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    monkeypatch.setitem(globals(), "PROMPTS", ["plain", JAVASCRIPT, *PROMPTS[2:]])
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    write_run(tmp_path / "again")
    stage.run(params(name=JAVASCRIPT))
    ours = Path("reports/report.html").read_text(encoding="utf-8")
    seen = {}
    for name, text in (
        ("ours", ours),
        ("unescaped", f"<html><title>ours</title><body>{JAVASCRIPT}</body></html>"),
    ):
        (tmp_path / f"{name}.html").write_text(text)
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run(
            [browser, *options, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/{name}.html"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        seen[name] = done.stdout
    assert "<title>stolen</title>" in seen["unescaped"], "the browser would have run it"
    assert "<title>stolen</title>" not in seen["ours"] and "</html>" in seen["ours"]
    assert (
        seen["ours"].count("&lt;script&gt;document.title = 'stolen'&lt;/script&gt;") >= 2
    )  # name and prompt


def test_the_files_beside_the_page(finished: Path, first: tuple[Path, Tracked]) -> None:
    compared = json.loads((finished / "comparisons.json").read_text(encoding="utf-8"))
    assert len(compared) == PAIRS * 3
    assert compared[0]["mean_difference"] == pytest.approx(2)
    compare = json.loads((finished / "metrics/report.json").read_text(encoding="utf-8"))
    own = {"gain": 0.25, "low": 0.25, "high": 0.25, "win_rate": 1.0}
    assert own.items() <= compare["spo"].items() and compare["spo"]["seconds"] == 120
    assert compare["accuracy"] == 0.7188, "the mean of .8125 and .625"
    assert json.loads((finished / "suites.json").read_text(encoding="utf-8")) == {}
    tracked = first[1]
    assert tracked.metrics["spo_vs_base/oracle_aesthetic/difference"] == 0.25
    assert tracked.compared["spo/gain"] == 0.25 and "spo/gain" not in tracked.metrics
    assert tracked.artifacts == ["report.html", "comparisons.json", "grid.png", "gallery.html"]
    assert not [p for p in finished.rglob(".*")]  # no half file


def test_the_grid_has_the_base_and_the_methods(finished: Path) -> None:
    grid = Image.open(finished / "grid.png").convert("RGB")
    assert 1150 <= grid.width <= 1350 and 400 < grid.height < 1000
    assert (finished / "grid.png").stat().st_size < 1_000_000
    colours = {c for _, c in grid.getcolors(1_000_000)}
    assert {(40, 0, 90), (100, 0, 90), (160, 50, 90)} <= colours  # base, Diffusion-DPO, SPO
    assert (70, 0, 90) not in colours  # base with more guidance


def test_a_suite_has_its_own_rows_and_tables(tracked: Tracked) -> None:
    """The test split has four prompts here, three images of each: the fourth image is the second prompt's."""
    for path in Path("outputs/scores").glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        table.assign(prompt=[f"p {i // 3}" for i in range(N)]).to_csv(path, index=False)
        rewrite_prompts(Path("outputs/images") / path.stem, [f"p {i // 3}" for i in range(N)])
    folder = Path("outputs/scores/suites/parti")
    folder.mkdir(parents=True)
    for variant, shift in SHIFT.items():
        prompts = [f"parti {i}" for i in range(5) for _ in range(2)]
        table = pd.DataFrame({"index": range(10), "prompt": prompts, "seed": range(10), "hps": 3 * shift})
        table.to_csv(folder / f"{variant}.csv", index=False)
    generate = {**yaml.safe_load(config.preset("scenes"))["generate"], "suites": {"parti": "own/parti.tsv"}}
    stage.run(params(generate=generate))
    rows = json.loads(Path("reports/suites.json").read_text(encoding="utf-8"))["parti"]
    assert len(rows) == PAIRS and rows[0]["n"] == 5  # two images of a prompt count once
    first = next(r for r in rows if (r["method"], r["baseline"]) == ("spo", "base"))
    assert first["mean_difference"] == 6 and first["win_rate"] == 1
    assert (
        len(json.loads(Path("reports/comparisons.json").read_text(encoding="utf-8"))) == PAIRS * 3
    )  # without the suite's
    assert tracked.metrics["parti/spo_vs_base/hps/difference"] == 6 and "suites.json" in tracked.artifacts
    page = Path("reports/report.html").read_text(encoding="utf-8")
    assert "Other suites of prompts" in page and "<h3>parti</h3>" in page and "<p>5 prompts.</p>" in page
    assert page.count('<table class="comparisons">') == 2
    assert "4 test prompts of data/prompts/evaluation.txt, 3 images each" in page
    prompts, images = results.first_images(results.all_scores(("base",)), 2)
    assert prompts == ["p 0", "p 1"]
    assert [image.getpixel((0, 0))[1] for image in images["base"]] == [0, 30]


def test_a_suite_without_scores_is_one_line(tracked: Tracked) -> None:
    generate = {**yaml.safe_load(config.preset("scenes"))["generate"], "suites": {"parti": "own/parti.tsv"}}
    with pytest.raises(
        ValueError, match="^generate.suites.parti: outputs/scores/suites/parti: no scores there"
    ):
        stage.run(params(generate=generate))


def test_the_same_run_gives_the_same_files(tracked: Tracked, first: tuple[Path, Tracked]) -> None:
    stage.run(params())
    for name in ("report.html", "grid.png", "comparisons.json", "gallery.html", "gallery/spo/00011.webp"):
        assert (Path("reports") / name).read_bytes() == (first[0] / name).read_bytes()


def test_a_run_without_oracle_or_facts_says_what_is_missing(tracked: Tracked) -> None:
    for path in Path("outputs/scores").glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        table[["index", "prompt", "seed", "pickscore"]].to_csv(path, index=False)
    for path in (*Path("reports").rglob("*.*"), Path("data/world.json"), Path("dvc.lock")):
        path.unlink()
    stage.run(params())
    page = Path("reports/report.html").read_text(encoding="utf-8")
    assert "Prompt alignment was not measured separately" in page
    assert "the same renderer" not in page and "Validation of the oracle" not in page
    for missing in ("no accuracies", "no training curves", "no stage times"):
        assert missing in page


def test_images_that_were_not_scored_are_refused(tracked: Tracked) -> None:
    for path in Path("outputs/scores").glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        table.assign(seed=table["seed"] + 1).to_csv(path, index=False)
    with pytest.raises(ValueError, match="not the images scored in outputs/scores/base.csv"):
        stage.run(params())


def test_images_beyond_those_on_the_page_are_checked_too(finished: Path) -> None:
    table = results.all_scores(("base",))["base"].iloc[:-1]
    with pytest.raises(ValueError, match="not the images scored in outputs/scores/base.csv"):
        list(results.scored_images("base", table))


def test_a_gallery_too_large_for_mlflow_stays_on_disk(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LOGGED_BYTES", 1000)
    stage._log(tracked := Tracked(), [], {})
    assert tracked.artifacts == ["report.html", "comparisons.json", "grid.png"]
    assert (finished / "gallery.html").stat().st_size > 1000
    assert len(list((finished / "gallery").rglob("*.webp"))) == N * len(SHIFT)


def test_scores_that_are_missing_or_have_no_prompt_are_refused(tracked: Tracked) -> None:
    Path("outputs/scores/spo.csv").write_text("index,seed,hps\n0,7,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"outputs/scores/spo.csv: no column 'prompt'"):
        stage.run(params())
    for path in Path("outputs/scores").glob("*.csv"):
        path.unlink()
    with pytest.raises(ValueError, match="no scores in this folder; run `make repro`"):
        stage.run(params())
