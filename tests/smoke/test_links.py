"""DVC's hard links: an output is a file of its cache, which a stage that is run by hand must not change."""

import os
from pathlib import Path

import clones
import pytest
import soak
import yaml

pytestmark = pytest.mark.smoke


def test_no_stage_writes_into_a_file_that_dvc_s_cache_shares(copy: Path, tmp_path: Path) -> None:
    twins: dict[Path, tuple[bytes, int, int]] = {}
    for file in outputs(copy):
        twin = tmp_path / "cache" / file.relative_to(copy)
        twin.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, twin)
        twin.chmod(0o444)  # as DVC protects it
        os.utime(twin, ns=(0, 0))
        twins[twin] = (twin.read_bytes(), twin.stat().st_mtime_ns, twin.stat().st_mode)
    assert len(twins) > 40
    for stage in soak.STAGES:
        clones.must(copy, "spo", *stage)
    now = {t: (t.read_bytes(), t.stat().st_mtime_ns, t.stat().st_mode) for t in twins}
    assert [str(t) for t in twins if now[t] != twins[t]] == []
    assert [str(t) for t in twins if t.stat().st_nlink > 1] == []  # each output was made anew


def outputs(folder: Path) -> list[Path]:
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
    outs = [folder / out["path"] for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return [f for out in outs for f in (out.rglob("*") if out.is_dir() else [out]) if f.is_file()]
