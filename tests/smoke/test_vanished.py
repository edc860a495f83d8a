"""Every input of every stage deleted or torn: one line that names it, no exit 0, nothing half written."""

import csv
import io
import json
import zipfile
from pathlib import Path

import clones
import pyarrow.parquet as pq
import pytest

from spo import cli

pytestmark = pytest.mark.smoke
WEIGHTS = "*.safetensors"
CASES = (  # stage, item, folder, pattern of the file, what is torn of it
    ("prompts", None, "data/prompts", "train.txt"),
    ("pairs", None, "data/pairs", "train-00000.parquet"),
    ("preference", None, "outputs/pairs/train", "*.parquet"),
    ("preference", None, "data/scorers/pickscore", WEIGHTS),
    ("align", "spo", "outputs/preference", WEIGHTS),
    ("align", "spo", "outputs/prompts", "train.txt"),
    ("align", "spo", "data/base/unet", WEIGHTS),
    ("align", "diffusion_dpo", "outputs/pairs", "summary.json"),
    ("generate", "spo", "outputs/align/spo", WEIGHTS),
    ("generate", "base", "data/base/vae", WEIGHTS),
    ("generate", "base", "outputs/prompts", "test.txt"),
    ("score", "spo", "outputs/images/spo", "images.zip"),
    ("score", "spo", "data/scorers/pickscore", WEIGHTS),
    ("score", "spo", "data/scorers/hps", "*.pt"),
    ("score", "spo", "data/oracle", "*"),
    ("report", None, "outputs/scores", "spo.csv"),
    ("report", None, "outputs/images/spo", "images.zip"),
)


@pytest.fixture(scope="module")
def workspace(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clones.copy(clone, tmp_path_factory.mktemp("vanished") / "spo")


# a shorter list is a list, and one shard or table of several that is gone makes another experiment: that is
# for DVC to see, which runs the stages before again
WHOLE = {
    *{("data/prompts", "torn"), ("outputs/prompts", "torn")},
    *{("data/pairs", "deleted"), ("outputs/scores", "deleted")},
}
DAMAGES = [
    (case, damage)
    for case in CASES
    for damage in ("deleted", "torn", "emptied")
    if (case[2], damage) not in WHOLE
]


def named(value) -> str:
    return value if isinstance(value, str) else f"{value[0]}-{value[2].rpartition('/')[2]}-{value[3]}"


@pytest.mark.parametrize(("case", "damage"), DAMAGES, ids=named)
def test_a_damaged_input_is_one_line(workspace: Path, monkeypatch, capfd, case, damage: str) -> None:
    stage, item, where, pattern = case
    monkeypatch.chdir(workspace)
    file = max((p for p in (workspace / where).glob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)
    content, before = file.read_bytes(), made(workspace)
    file.unlink()  # the cache of DVC may hold the same file
    if damage != "deleted":
        file.write_bytes(content[: len(content) * 2 // 3] if damage == "torn" else b"")
    try:
        assert cli.main([stage, *([item] if item else [])]) == 2
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(content)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("spo: ")]
    assert len(lines) == 1, lines
    # a table that is shorter is named by its variant: "spo has 6 rows, base 8"
    assert any(name in lines[0] for name in (file.name, file.parent.name, where, f"{file.stem} has")), lines
    assert {p: c for p, c in made(workspace).items() if not p.startswith("outputs/pairs")} == {
        p: c for p, c in before.items() if not p.startswith("outputs/pairs")
    }, "the last good state"


def made(folder: Path) -> dict[str, int]:
    """What stages made, by its content."""
    return {
        str(p.relative_to(folder)): hash(p.read_bytes())
        for root in ("outputs", "reports")
        for p in (folder / root).rglob("*")
        if p.is_file()
    }


def test_rows_in_are_rows_out_at_every_stage(clone: Path) -> None:
    out = clone / "outputs"
    prompts = json.loads((out / "prompts/summary.json").read_text())
    for name, parts in (("train", ["train"]), ("evaluation", ["test", "validation"])):
        used = sum(len((out / f"prompts/{p}.txt").read_text().splitlines()) for p in parts)
        aside = sum(prompts["rejected"][name].values())
        assert used + aside + prompts["unused"][name] == prompts["read"][name] > 0
    pairs = json.loads((out / "pairs/summary.json").read_text())
    written = {
        part: sum(pq.ParquetFile(p).metadata.num_rows for p in (out / "pairs" / part).glob("*.parquet"))
        for part in ("train", "validation")
    }
    source = pq.ParquetFile(clone / "data/pairs/train-00000.parquet").metadata.num_rows  # of the smoke preset
    aside = len(list(csv.DictReader((out / "pairs/rejected.csv").open())))
    assert sum(written.values()) + aside + sum(pairs["filtered"].values()) == pairs["read"] == source
    for part, count in written.items():
        (latents,) = (clone / ".spo/latents").glob(f"{part}-*")
        assert len(json.loads((latents / "pairs.json").read_text())) == count
    test = (out / "prompts/test.txt").read_text().splitlines()
    for variant in ("base", "base_high_guidance", "spo", "diffusion_dpo"):
        with zipfile.ZipFile(out / f"images/{variant}/images.zip") as archive:
            drawn = [r["prompt"] for r in csv.DictReader(io.StringIO(archive.read("index.csv").decode()))]
            assert len(archive.namelist()) == len(drawn) + 1
        scored = [r["prompt"] for r in csv.DictReader((out / f"scores/{variant}.csv").open())]
        assert scored == drawn == test
