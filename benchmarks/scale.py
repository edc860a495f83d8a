"""Measure what grows with pairs, weights and processes: the numbers of docs/scale.md.

`python -m benchmarks.scale` prints them as Markdown tables (about two minutes on one core).
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks import shapes, tracking_load
from benchmarks.page import table
from spo import cli, config
from spo.api import load_params
from spo.config import yaml_text

SIZES = (500, 5_000)  # pairs
SIDE = 64  # of their images, in pixels
PARAMETERS = {"sd15": "sd", "sdxl": "sdxl"}
FP32 = 4  # bytes


def main() -> None:
    """Measure, and print the tables."""
    argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__).parse_args()
    for title, head, rows in (
        (
            "Stage `pairs`",
            ["pairs", "CPU s", "peak MB", "bytes read a pair", "bytes written a pair"],
            pairs(),
        ),
        ("Bytes of trained weights", ["weights", "parameters", "update, MB", "checkpoint, MB"], weights()),
        (
            "All-reduce of one update",
            ["parameters", "bytes", "of them gradients", "collectives"],
            [traffic()],
        ),
        (
            "Tracking of one training",
            ["iterations", "requests", "of them log-batch", "rows", "s"],
            tracking_load.of_one_training(),
        ),
        (
            "A tracking server with one worker and sqlite",
            ["metrics a request", "clients", "requests/s"],
            tracking_load.of_a_server(),
        ),
    ):
        print(f"\n## {title}\n\n{table(head, rows)}")


def pairs() -> list[list[str]]:
    """The stage on tables of random pairs, each size in a process of its own."""
    rows = []
    for count in SIZES:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            read = _save_pairs(Path("pairs"), count)
            seconds, peak = _in_a_process(lambda: _run("pairs"))
            written = sum(p.stat().st_size for p in Path("outputs/pairs").rglob("*.parquet"))
            sizes = [f"{read / count:,.0f}", f"{written / count:,.0f}"]
            rows.append([f"{count:,}", f"{seconds:.1f}", f"{peak:,.0f}", *sizes])
    return rows


def _save_pairs(folder: Path, count: int) -> int:
    """Write random pairs in Pick-a-Pic's columns, and params.yaml; return their bytes."""
    drawn, rows = np.random.default_rng(0), []
    for i in range(count):
        images = [_png(drawn) for _ in range(2)]
        labels = {"label_0": float(i % 2), "label_1": float(1 - i % 2), "has_label": True}
        rows.append({"caption": f"a circle {i}", "jpg_0": images[0], "jpg_1": images[1], **labels})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=100)
    params = yaml_text.parse(config.preset("smoke"), "smoke")
    params["pairs"] |= {"source": str(folder), "filter": None}
    Path("params.yaml").write_text(yaml_text.dump(params), encoding="utf-8")
    return (folder / "train-00000.parquet").stat().st_size


def _png(drawn: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    small = drawn.integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def _run(*words: str) -> None:
    if code := cli.main(words):
        raise SystemExit(code)


def _in_a_process(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and peak resident MB of a fork that does the work."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    assert status == 0, status
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def weights() -> list[list[str]]:
    """Parameters at the real sizes, counted on the meta device; bytes in fp32."""
    rows = []
    for preset in PARAMETERS:
        lora = load_params(preset).align.section("spo").lora
        unet = _unet(preset)
        adapter = sum(
            lora.rank * (layer.in_features + layer.out_features)
            for name, layer in unet.named_modules()
            if lora and isinstance(layer, torch.nn.Linear) and name.endswith(tuple(lora.target_modules))
        )
        full = sum(p.numel() for p in unet.parameters())
        assert lora is not None
        for kind, number in ((f"LoRA of rank {lora.rank}", adapter), ("full", full)):
            update, state = FP32 * number / 1e6, 3 * FP32 * number / 1e6  # state: weights, Adam's two moments
            rows.append([f"{preset}, {kind}", f"{number:,}", f"{update:,.1f}", f"{state:,.1f}"])
    return rows


def _unet(preset: str) -> Any:
    """The UNet of a released model, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**shapes.SHAPES[preset].unet)


class Squares:
    """An objective that takes no time: what is counted is what the training loop sends."""

    name, iterations = "squares", 1

    def __init__(self, size: int) -> None:
        self.weight = torch.nn.Parameter(torch.ones(size))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.weight]

    def collect(self, iteration: int) -> Any:
        from types import SimpleNamespace

        return [[SimpleNamespace(weight=torch.ones(2), prompts=["", ""], timesteps=torch.zeros(2))]], {}

    def loss(self, batch: Any, check: Any) -> Any:
        return self.weight.square().sum().expand(2), {}


def traffic(size: int = 100_000) -> list[str]:
    """Bytes that one process hands to the collectives of one update, of two processes by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_update, args=(rank, port, size, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    moved, gradients, calls = queue.get(timeout=120)
    for process in processes:
        process.join()
    return [f"{size:,}", f"{moved:,}", f"{gradients:,}", str(calls)]


def _update(rank: int, port: int, size: int, queue: Any) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {k: str(v) for k, v in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from accelerate import PartialState

    from spo.training import distributed, loop
    from spo.training.state import TrainingState

    objective: Any = Squares(size)
    settings = load_params("smoke").align.section("spo").optimizer
    state = TrainingState(objective.parameters(), settings, 0.0, False)
    PartialState._reset_state()  # the parent's, of one process
    distributed.state()
    with _counted() as sizes:
        loop._iteration(objective, 0, state)
    if rank == 0:
        queue.put((sum(sizes), max(sizes), len(sizes)))
    distributed.state().wait_for_everyone()


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes of this process's tensor in each collective."""
    sizes: list[int] = []
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather

    def reduced(value: torch.Tensor, *rest: Any) -> Any:
        sizes.append(value.nbytes)
        return reduce(value, *rest)

    def gathered(parts: list[torch.Tensor], value: torch.Tensor, *rest: Any) -> Any:
        sizes.append(value.nbytes)
        return gather(parts, value, *rest)

    with (
        patch.object(torch.distributed, "all_reduce", reduced),
        patch.object(torch.distributed, "all_gather", gathered),
    ):
        yield sizes


if __name__ == "__main__":
    main()
