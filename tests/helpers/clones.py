"""Temporary clones with the smoke preset: commands as a user types them, copies, what two runs differ in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import in_fork
import yaml

ROOT = Path(__file__).parents[2]
RECORDER = Path(__file__).with_name("recorder")
FORKED = Path(__file__).with_name("forked")  # a `dvc` whose stages are forks of it
TIMED = ("seconds", "training_seconds")
UNEQUAL = ("report.html",)  # shows times, the commit and dvc.lock, which holds the hashes of times


def environment(folder: Path, *first: Path) -> dict[str, str]:
    """With this environment's programs first on the path, and the clone's code behind `first`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = os.pathsep.join(map(str, [*first, folder / "src"]))
    variables = {**os.environ, "PATH": path, "PYTHONPATH": code, "DVC_NO_ANALYTICS": "1"}
    return {
        k: v for k, v in variables.items() if k not in ("MLFLOW_TRACKING_URI", "SPO_PARENT_RUN", "DVC_STAGE")
    }


def run(
    folder: Path, *command: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    options = {
        "cwd": folder,
        "env": environment(folder) | (variables or {}),
        "capture_output": True,
        "text": True,
    }
    return subprocess.run(command, timeout=3000, **options)


def spo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `spo ARGUMENTS` with this repository's code, without its start of 7 s."""
    return in_fork.spo(folder, *arguments, variables=environment(folder))


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "dvc", *arguments)


def must(folder: Path, *command: str) -> str:
    done = {"spo": spo, "dvc": dvc}[command[0]](folder, *command[1:])
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def fresh(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A clone with the smoke preset, changed where `changes` says so, and its data; nothing has run."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    must(folder, "spo", "preset", "smoke", "--force")
    if changes:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        (folder / "params.yaml").write_text(yaml.safe_dump(_merged(params, changes), sort_keys=False))
    must(folder, "dvc", "pull", "--quiet", "data.dvc")
    return folder


def _merged(one: Any, other: Any) -> Any:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return other
    return {**one, **{k: _merged(one.get(k), v) for k, v in other.items()}}


def copy(clone: Path, folder: Path) -> Path:
    shutil.copytree(clone, folder, symlinks=True)
    return folder


def forget(clone: Path, stages: Iterable[str] | None = None) -> None:
    """As if the stages (DVC's names; None: all) had never run: no outputs, no entries, nothing in DVC's cache
    of runs, and no state to resume from."""
    path = clone / "dvc.lock"
    lock = yaml.safe_load(path.read_text())
    for name in list(lock["stages"]) if stages is None else stages:
        for out in lock["stages"].pop(name).get("outs", []):
            made = clone / out["path"]
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    path.write_text(yaml.safe_dump(lock, sort_keys=False))
    shutil.rmtree(clone / ".dvc/cache/runs", ignore_errors=True)
    shutil.rmtree(clone / ".spo/resume", ignore_errors=True)
    if stages is None:
        shutil.rmtree(clone / ".spo/latents", ignore_errors=True)


def differences(one: Path, other: Path) -> list[str]:
    """Files under outputs/ and reports/ that are not the same in both, times aside."""
    names = {
        str(p.relative_to(root))
        for root in (one, other)
        for part in ("outputs", "reports")
        for p in (root / part).rglob("*")
        if p.is_file() and p.name not in UNEQUAL
    }
    assert len(names) > 20, f"{one} holds next to nothing: {sorted(names)}"
    return [name for name in sorted(names) if not _same(one / name, other / name)]


def _same(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    if one.suffix == ".json":
        return _untimed(json.loads(one.read_text(encoding="utf-8"))) == _untimed(
            json.loads(other.read_text(encoding="utf-8"))
        )
    if one.suffix == ".safetensors":  # the order of its header is no content
        import torch
        from safetensors.torch import load_file

        left, right = load_file(one), load_file(other)
        return left.keys() == right.keys() and all(
            v.dtype == right[k].dtype and torch.equal(v, right[k]) for k, v in left.items()
        )
    return one.read_bytes() == other.read_bytes()


def _untimed(content: Any) -> Any:
    return {k: v for k, v in content.items() if k not in TIMED} if isinstance(content, dict) else content
