"""The build steps of the Dockerfile in a clean folder, as far as they need neither a network nor root.

Not run: `apt-get`, `pip install uv`, the download of the locked packages and of torch (`uv` is a stand-in
that compares the lock with this environment), `useradd`, `chown`. Run as they are: the copies, the choice of
the device, the lock without CUDA, the installation of spo, its start, DVC's and git's settings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = """#!{python}
import json, pathlib, re, sys
from importlib import metadata
if sys.argv[1:3] == ["pip", "sync"]:
    lock = pathlib.Path(sys.argv[-1]).read_text()
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;]+)", lock, re.M))
    hashed = lock.count("--hash=sha256:")
    assert len(pinned) > 100 and hashed > len(pinned), "no lock"
    installed = {{}}
    for name in pinned:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    assert {{n: pinned[n] for n in installed}} == installed, "another version than the lock's"
else:
    pinned = {{}}
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], sorted(pinned)]) + chr(10))
"""


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines if line.strip()]


class Build:
    """A folder in the place of the container's root."""

    def __init__(self, root: Path, device: str) -> None:
        self.root, self.folder, self.user, self.variables = root, root, "root", dict[str, str]()
        self.log = root / "uv.jsonl"
        programs = root / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
        (site,) = (root / "venv/lib").glob("*/site-packages")
        (host,) = {p for p in sys.path if p.endswith("site-packages")}
        (site / "host.pth").write_text(f"{host}\n")
        programs.mkdir()
        self.program("uv", UV.format(python=root / "venv/bin/python", log=str(self.log)))
        for name in ("apt-get", "useradd", "chown"):
            self.program(name, "#!/bin/sh\n")
        self.program("dvc", f'#!/bin/sh\nexec {root}/venv/bin/python -m dvc "$@"\n')
        path = os.pathsep.join(map(str, (programs, root / "venv/bin", "/usr/bin", "/bin")))
        self.variables = {"PATH": path, "HOME": str(root / "home"), "DEVICE": device, "PIP_NO_INDEX": "1"}
        (root / "home").mkdir()

    def program(self, name: str, text: str) -> None:
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)

    def inside(self, text: str) -> str:
        """With the container's paths below the folder."""
        return re.sub(r"(?<![\w.])/(spo|cache|data|tmp|var)\b", rf"{self.root}/\1", text)

    def step(self, kind: str, text: str) -> None:
        if kind == "WORKDIR":
            self.folder = Path(self.inside(text))
            self.folder.mkdir(parents=True)
        elif kind == "COPY":
            *sources, target = text.split()
            for source in sources:
                copy(source, self.folder / target)
        elif kind == "RUN" and 'pip install --no-cache-dir "uv' not in text:
            self.run(self.inside(text))
        elif kind == "ENV":
            self.variables |= dict(part.split("=", 1) for part in self.inside(text).split())
        elif kind == "USER":
            self.user = text

    def run(self, command: str) -> str:
        (self.root / "tmp").mkdir(exist_ok=True)
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


def copy(source: str, target: Path) -> None:
    """What git tracks, and its folder: all else is in .dockerignore or not of the project."""
    if source != ".":
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, target)
        return
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_build_step_works_in_a_clean_folder(tmp_path: Path, device: str) -> None:
    build = Build(tmp_path, device)
    for kind, text in instructions():
        build.step(kind, text)
    assert build.user == "spo", "not root"
    calls = [json.loads(line) for line in build.log.read_text().splitlines()]
    pinned = set(calls[0][1])
    assert {"diffusers", "mlflow", "prefect", "dvc"} <= pinned
    gpu = {name for name in pinned if name.startswith(("torch", "nvidia-", "cuda-", "triton"))}
    if device == "cuda":
        assert len(calls) == 1 and {"torch", "torchvision", "triton"} <= gpu
    else:
        assert gpu == set() and len(calls) == 2
        lock = (ROOT / "requirements.lock").read_text()
        wanted = re.findall(r"^(?:torch|torchvision)==\S+", lock, re.M)
        assert calls[1][0][-2:] == wanted and "--torch-backend" in calls[1][0]
    assert "register" in build.run("spo --help")
    assert Path(build.run("python -c 'import spo; print(spo.__file__)'").strip()).is_relative_to(tmp_path)
    assert build.run("dvc config --local cache.dir").strip() == f"{tmp_path}/cache/dvc"


def test_another_device_is_refused(tmp_path: Path) -> None:
    build = Build(tmp_path, "tpu")
    with pytest.raises(AssertionError, match="DEVICE is tpu: give cuda or cpu"):
        for kind, text in instructions():
            build.step(kind, text)


def test_data_and_caches_are_volumes_and_nothing_runs_as_root() -> None:
    steps = instructions()
    assert ("VOLUME", '["/cache", "/data"]') in steps and ("ARG", "DEVICE=cuda") in steps
    kinds = [kind for kind, _ in steps]
    assert kinds.index("USER") < kinds.index("ENTRYPOINT") and kinds.count("USER") == 1
    assert "HF_HOME=/cache/" in dict(steps)["ENV"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "data", "outputs", ".spo", ".dvc/cache"} <= set(ignored)
