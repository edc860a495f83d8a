"""DVC's hard links: an output is a file of its cache, which a stage that is run by hand must not change."""

import os
from pathlib import Path

import clones
import pytest
import yaml

pytestmark = pytest.mark.smoke

STAGES = [  # each of those that have outputs, and one of each kind
    ("inputs", "prompts", "pairs", "generate@spo", "score@spo", "report"),
    pytest.param(("preference", "preference_latent", "align@spo"), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("stages", STAGES, ids="-".join)
def test_no_stage_writes_into_a_file_that_dvc_s_cache_shares(
    copy: Path, tmp_path: Path, stages: tuple[str, ...]
) -> None:
    lock = yaml.safe_load((copy / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    twins: dict[Path, tuple[bytes, int, int]] = {}
    for file in files(copy / out["path"] for name in stages for out in lock[name]["outs"]):
        twin = tmp_path / "cache" / file.relative_to(copy)
        twin.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, twin)
        twin.chmod(0o444)  # as DVC protects it
        os.utime(twin, ns=(0, 0))
        twins[twin] = now(twin)
    assert len(twins) > 8
    for name in stages:
        clones.must(copy, *lock[name]["cmd"].split())
    assert [str(twin) for twin in twins if now(twin) != twins[twin]] == []
    assert [str(twin) for twin in twins if twin.stat().st_nlink > 1] == []  # each output was made anew


def now(file: Path) -> tuple[bytes, int, int]:
    return file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_mode


def files(outs) -> list[Path]:
    return [f for out in outs for f in (out.rglob("*") if out.is_dir() else [out]) if f.is_file()]
