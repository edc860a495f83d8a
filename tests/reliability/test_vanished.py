"""Inputs that go away or are torn while a stage reads them, and folders that cannot be written."""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_backbone import Whole
from PIL import Image

from spo import config
from spo.data import latents
from spo.ingest import sources
from spo.runtime import files
from spo.stages import pairs as pairs_stage
from spo.training.checkpoint import CheckpointStore


def shard(path: Path, rows: int = 200) -> None:
    """Pairs of grainy pictures, in several row groups."""
    grain = np.random.default_rng(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(grain.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(buffer, format="PNG")
        return buffer.getvalue()

    table = pd.DataFrame({"caption": [f"{path.stem} {i}" for i in range(rows)]})
    for name in ("jpg_0", "jpg_1"):
        table[name] = [picture() for _ in range(rows)]
    table["label_0"], table["label_1"] = 1.0, 0.0
    table.to_parquet(path, row_group_size=50)


def tear(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (Path.unlink, "b", "b.parquet: not a readable parquet file"),
        (tear, "b", "b.parquet: not a readable parquet file"),
        # pyarrow may take the end of a torn file for its end: then the count tells
        (
            tear,
            "a",
            r"a.parquet: damaged after row|400 rows announced, \d+ read; is the source being written",
        ),
    ],
)
def test_a_shard_that_goes_while_it_is_read_is_one_line(tmp_path, monkeypatch, damage, name, message) -> None:
    """It happens after the first row; what is read of it before counts for nothing."""
    for each in "ab":
        shard(tmp_path / f"{each}.parquet")
    real = sources.read_rows

    def read_rows(source, check):
        rows = real(source, check)
        yield next(rows)
        if check.__name__ == "check":  # the second pass
            damage(tmp_path / f"{name}.parquet")
        yield from rows

    monkeypatch.setattr(sources, "read_rows", read_rows)
    section = config.Pairs(source=str(tmp_path), validation_fraction=0.3)
    with pytest.raises(ValueError, match=message) as error:
        pairs_stage.prepare(section, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/summary.json").exists()


@pytest.fixture
def mounted(tmp_path: Path):
    """mount(options, folder): something mounted there until the test ends."""
    done: list[Path] = []

    def mount(folder: Path, *options: str) -> Path:
        if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
            pytest.skip("no mounts here")
        done.append(folder)
        return folder

    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    yield mount
    for folder in reversed(done):
        subprocess.run(["umount", str(folder)], check=True)


class Small(Whole):
    """A VAE that keeps all."""

    latent_shape, device = (3, 16, 16), torch.device("cpu")

    def encode(self, images):
        return images

    def inference(self):
        return torch.no_grad()


def test_latents_that_find_no_room_are_one_line(tmp_path, mounted) -> None:
    """A memory-mapped page without room would be SIGBUS: the process killed without a word."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted(folder, "-t", "tmpfs", "-o", "size=64k", "spo")
    with pytest.raises(OSError, match="No space left on device: the pairs' latents take 3.1 MB"):
        latents.encode([], 1000, Small(), lambda data: data, folder / "train")


def test_a_folder_that_cannot_be_written_is_said_and_left_as_it_was(tmp_path, mounted, monkeypatch) -> None:
    """Read-only for root too: a mount, not a file's mode."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "-t", "tmpfs", "-o", "size=1m", "spo")
    store = CheckpointStore(folder)
    store.save(1, {"x": torch.ones(2)})
    files.write_json(folder / "metrics.json", {"a": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OSError, match=r"checkpoint not written \(Read-only file system\); the one before"):
        store.save(2, {"x": torch.zeros(2)})
    with pytest.raises(OSError, match="Read-only file system.*metrics.json"):
        files.write_json(folder / "metrics.json", {"a": 2})
    assert store.latest()[0] == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
