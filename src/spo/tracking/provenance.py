"""Provenance of a run: its parameters, code, packages and machine."""

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from spo.config import PREFERENCE_BASELINES
from spo.runtime.files import digest
from spo.runtime.messages import first_line, one_line, public
from spo.tracking.records import warn

PACKAGES = (
    *("spo", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate"),
    *("tokenizers", "open_clip_torch", "numpy", "pandas", "pillow", "dvc", "mlflow", "prefect"),
)


def flatten(params: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Return nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}{separator}", separator) if inner else {f"{prefix}{key}": value}
    return flat


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def section(params: Mapping[str, Any], stage: str, name: str | None = None) -> dict[str, Any]:
    """Return the parameters of a stage: its section (of an item its own part) and the seed."""
    if (stage, name) == ("preference", "latent"):
        stage, name = "latent_preference", None
    every = dict(params.get(stage, {}))
    if stage == "preference" and name in PREFERENCE_BASELINES:
        every |= PREFERENCE_BASELINES[name]
    own = {k: v for k, v in every.items() if not (name in every and k != name and isinstance(v, dict))}
    return {"seed": params.get("seed"), **flatten({stage: own})}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def hardware() -> dict[str, Any]:
    """Return tags: processor, memory, accelerator (if torch was loaded), operating system."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    named = re.search("model name.*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    tags: dict[str, Any] = {
        "hardware.cpus": os.cpu_count(),
        "hardware.cpu": named[1] if named else platform.processor() or platform.machine(),
        "hardware.memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "hardware.system": platform.platform(terse=True),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        tags["hardware.gpu"] = torch.cuda.get_device_name()
        tags["hardware.gpus"] = torch.cuda.device_count()
    return tags


def code() -> dict[str, str]:
    """Return tags: source, git commit and branch, whether files differ from it, and dvc.lock's SHA-256.

    If git refuses to read this folder, `git.refused` is the reason.
    """
    lock = digest(Path("dvc.lock"))
    tags = {"dvc.lock": lock} if lock else {}
    tags |= {"mlflow.source.type": "PROJECT", "mlflow.source.name": Path.cwd().name}
    if refused := git_refusal(Path.cwd()):
        return tags | {"git.refused": refused}
    if url := public(git("config", "remote.origin.url")):
        tags |= {"mlflow.source.name": url, "mlflow.source.git.repoURL": url}
    if branch := git("branch", "--show-current"):
        tags["mlflow.source.git.branch"] = branch
    if commit := git("rev-parse", "HEAD"):
        changes = git("status", "--porcelain", "--untracked-files=no")
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(changes)).lower()}
    return tags


def git(*arguments: str) -> str:
    """Return what a git command prints; nothing if it fails (see `git_refusal`)."""
    return _git(*arguments)[0]


@functools.cache
def git_refusal(folder: Path) -> str:
    """Return in one line, without paths, why git knows no commit of a folder; empty if it does.

    A process warns once, unless the folder is in no repository, such as an unpacked archive.
    """
    _, why = _git("-C", str(folder), "rev-parse", "HEAD")
    if why.startswith("not a git repository (or any"):
        return "not in a git repository"
    if why:
        warn(f"no commit is recorded, since git refuses ({why}); `git status` says what to do")
    return re.sub(r"(:| at)? '?/.*", "", why)


def _git(*arguments: str) -> tuple[str, str]:
    """Return what a git command prints, and why it failed; one of them is empty."""
    command, environment = ["git", *arguments], {**os.environ, "LC_ALL": "C"}  # no translated messages
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", one_line(error)
    if done.returncode != 0:
        return "", first_line(ValueError(done.stderr), 300).removeprefix("fatal: ")
    return done.stdout.strip(), ""
