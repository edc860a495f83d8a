"""Mutated input: each file is either read whole or refused in one line that names it.

SPO_FUZZ is the number of mutations (seeded); `SPO_FUZZ=5000 pytest tests/reliability/test_fuzz.py`
is the long version.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mutations import change_a_key, scramble
from PIL import Image

from spo import cli, config
from spo.data import images
from spo.ingest import prompt_files, selection, sources
from spo.rewards.aesthetic import AestheticHead
from spo.tracking import records
from spo.tracking.curve import Curve
from spo.training.checkpoint import CheckpointStore

MUTATIONS = int(os.environ.get("SPO_FUZZ", "450"))
SECONDS = 30.0  # more is a hang
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        pytest.fail(f"hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(buffer, format="PNG")
    return buffer.getvalue()


def params_file(folder: Path) -> Path:
    path = folder / "params.yaml"
    path.write_text(config.preset("smoke"))
    return path


def read_params(path: Path) -> None:
    flat = json.dumps(config.load(path).model_dump())
    assert "NaN" not in flat and "Infinity" not in flat, "a number that is none was accepted"


def prompt_file(ending: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, frame = folder / f"p.{ending}", pd.DataFrame({"caption": ["a b", 'say "x", y', "c é"], "n": 1})
        if ending == "txt":
            path.write_text("\n".join(frame.caption))
        elif ending in ("json", "jsonl"):
            frame.to_json(path, orient="records", lines=ending == "jsonl")
        elif ending == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
        return path

    return make


def read_prompts(path: Path) -> None:
    raw = prompt_files.read_prompts(path)
    chosen = selection.select(raw, len, 77)
    assert len(chosen.prompts) + chosen.rejected.total() == len(raw)
    "\n".join(chosen.prompts).encode()  # what the stage writes


def shard(folder: Path) -> Path:
    labels = {"label_0": 1.0, "label_1": 0.0, "has_label": True, "num_example_per_prompt": 2}
    rows = [{"caption": f"c {i}", "jpg_0": picture(), "jpg_1": picture(), **labels} for i in range(6)]
    pd.DataFrame(rows).to_parquet(folder / "a.parquet", compression=None)
    return folder / "a.parquet"


def read_shard(path: Path) -> None:
    rows = list(sources.read_rows(path))
    assert len(rows) == sources.count_rows(path)
    assert all((pair is None) != (reason is None) for pair, reason in rows)


def hpd_file(folder: Path) -> Path:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(picture())
    row = {"prompt": "a cat", "human_preference": [1, 0], "file_path": ["a.png", "b.png"]}
    (folder / "train.json").write_text(json.dumps([row] * 4))
    return folder / "train.json"


def read_hpd(path: Path) -> None:
    assert all((pair is None) != (reason is None) for pair, reason in sources.read_rows(path))


def checkpoint(folder: Path) -> Path:
    store = CheckpointStore(folder)
    for step in (1, 2):
        store.save(step, {"weights": [torch.full((5,), float(step))]})
    return folder / "00000002.ckpt"


def read_checkpoint(path: Path) -> None:
    step, state = CheckpointStore(path.parent).latest() or (0, {})
    assert step == 1 and state["weights"][0].tolist() == [1.0] * 5, "a tampered checkpoint was used"


def archive(folder: Path) -> Path:
    images.save_images(folder, [Image.new("RGB", (8, 8))] * 2, ["a", "b"], [1, 2])
    return folder / "images.zip"


def head(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(AestheticHead(2).state_dict(), folder / "head.pth")
    return folder / "head.pth"


def run_file(folder: Path) -> Path:
    with contextlib.chdir(folder):
        run = records.Run.create({"name": "n", "experiment": "e", "params": {"a": "1"}, "tags": {}})
        return run.path.absolute() / "run.json"


def read_run(path: Path) -> None:
    with contextlib.chdir(path.parents[3]):
        assert isinstance(records.Run(path.parent.name).read()["name"], object)


def curve_file(folder: Path) -> Path:
    curve = Curve(records.Run(), folder)
    for step in range(3):
        curve.log({"loss": 0.5}, step)
    return folder / "curve.jsonl"


def lock_file(folder: Path) -> Path:
    (folder / "dvc.lock").write_text((ROOT / "dvc.lock").read_text()[:3000].rsplit("\n  ", 1)[0])
    return folder / "dvc.lock"


def read_lock(path: Path) -> None:
    """DVC's own loader: its errors are one line too."""
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.strictyaml import load

    try:
        load(str(path), COMPILED_LOCKFILE_SCHEMA)
    except DvcException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None


TARGETS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "params": (params_file, read_params),
    **{ending: (prompt_file(ending), read_prompts) for ending in ("txt", "json", "jsonl", "csv", "tsv")},
    "prompts.parquet": (prompt_file("parquet"), read_prompts),
    "shard": (shard, read_shard),
    "hpd": (hpd_file, read_hpd),
    "checkpoint": (checkpoint, read_checkpoint),
    "images": (archive, lambda path: list(images.load_images(path.parent))),
    "head": (head, lambda path: AestheticHead.load(path)),
    "run": (run_file, read_run),
    "curve": (curve_file, records.read_curve),
    "dvc.lock": (lock_file, read_lock),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_input_is_read_whole_or_refused_in_a_line(target: str, tmp_path: Path, capfd) -> None:
    make, read = TARGETS[target]
    path = make(tmp_path)
    original = path.read_bytes()
    if target != "checkpoint":
        read(path)  # it is good as it is
    draw = random.Random(f"{target} 0")
    for number in range(max(1, MUTATIONS // len(TARGETS))):
        if target == "params" and number % 2:
            data = change_a_key(original.decode(), draw).encode(errors="surrogatepass")
        else:
            data = scramble(original, draw)
        if data == original:
            continue
        path.write_bytes(data)
        with at_most(SECONDS), warnings.catch_warnings():
            try:
                read(path)
            except (ValueError, OSError) as error:
                message = str(error)
                assert path.name in message and len(message.splitlines()) == 1 and len(message) < 1000, (
                    data,
                    message,
                )
            except (Exception, RecursionError) as error:
                pytest.fail(f"mutation {number}: {type(error).__name__}: {error}\n{data[:1500]!r}")


def test_renamed_keys_of_params_are_never_accepted(tmp_path: Path) -> None:
    text = config.preset("smoke")
    for line in text.splitlines():
        key = line.split(":")[0].strip()
        if ":" not in line or line.startswith("#") or "{" in key:
            continue
        (tmp_path / "params.yaml").write_text(text.replace(line, line.replace(f"{key}:", f"{key}z:"), 1))
        with pytest.raises(config.ConfigError, match=f"{key}z|'{key}'|{key}"):
            config.load(tmp_path / "params.yaml")


def test_mutations_through_the_command_line(tmp_path: Path, monkeypatch, capfd) -> None:
    draw = random.Random(1)
    path = params_file(tmp_path)
    original = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    for _ in range(max(2, MUTATIONS // 50)):
        path.write_bytes(scramble(original, draw))
        status = cli.main(["pairs"])
        said = capfd.readouterr().err
        assert status == 2 and "Traceback" not in said, said
        assert said.strip().splitlines()[-1].startswith("spo: "), said
