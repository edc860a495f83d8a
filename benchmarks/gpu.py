"""`python -m benchmarks.gpu`: the comparisons of `make bench` on a GPU, at the sizes of SD 1.5 and SDXL.

Random weights, bf16; nothing is downloaded. `--tiny` runs the same code on a CPU in tiny shapes, to see that
it works. It writes docs/benchmarks-gpu.md.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cards, gpu_page, images, lpo, models, offline, shapes, spo
from benchmarks.measure import Case, compare, timed

PROMPTS, PAIRS, IMAGES = 2, 4, 2
STEPS = {"num_inference_steps": 5, "divert_start_step": 1}
KINDS = {"sd15": "SD 1.5", "sdxl": "SDXL"}


def measure(name: str, tiny: bool, device: str, rounds: int, dtype: torch.dtype) -> gpu_page.Measured:
    """All of a family: its cases, then the time of each kind of work and the recipes' hours."""
    words = shapes.tokenizer()
    results, peak = [], {}
    every = cases(name, words, tiny, device, dtype)
    while (case := next(every, None)) is not None:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        result = compare(case, rounds)
        results.append(result)
        if device != "cpu":
            peak[result.name] = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {result.name}: {result.clock_ratio:.2f} of {result.against}", flush=True)
        del case  # it holds the models of its group
    loaded = shapes.load(name, words, tiny, device, dtype)
    seconds, counted = kinds(loaded, device)
    matmul = matmul_rate(device, dtype, 128 if tiny else 8192)
    rate = counted["unet"] / seconds["unet"]
    return gpu_page.Measured(name, results, peak, seconds, counted, matmul, recipes(name, rate))


def cases(name: str, words: Any, tiny: bool, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """As of `make bench`, each group with models of its own; results agree to bf16's rounding."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    def fresh() -> models.Models:
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        return shapes.load(name, words, tiny, device, dtype)

    def stepwise(loaded: models.Models) -> Iterator[Case]:
        how = spo.settings(loaded, PROMPTS, candidates=2, batch_size=PAIRS, **STEPS)
        yield from spo.cases(loaded, how, tolerance)

    yield from stepwise(fresh())
    yield from lpo.cases(fresh(), PROMPTS, STEPS["num_inference_steps"], tolerance)
    yield from offline.diffusion_dpo(fresh(), PAIRS, tolerance)
    yield from images.generation(fresh(), IMAGES, 1.0 if dtype == torch.float32 else 64.0)


def kinds(loaded: models.Models, device: str) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and FLOPs of one sample of each kind of work, with an adapter on the UNet."""
    backbone, spm = loaded.backbone, loaded.spm
    lora = loaded.params.align.section("spo").lora
    assert lora is not None
    down = backbone.feature_model()
    backbone.add_lora(lora, models.SEED)
    found: dict[str, float] = {}
    counted: dict[str, int] = {}
    for kind, run in _runs(backbone, spm, down).items():
        n = 1 if device == "cpu" else 8
        found[kind] = min(timed(partial(run, n))[1] for _ in range(3)) / n
        with FlopCounterMode(display=False) as counter:
            run(1)
        counted[kind] = counter.get_total_flops()
    return found, counted


def _runs(backbone: Any, spm: Any, down: Any) -> dict[str, Any]:
    text = backbone.encode_prompts(["a circle"])
    x, t = torch.zeros(1, *backbone.latent_shape), torch.full((1,), 501)
    x, t = x.to(backbone.device), t.to(backbone.device)
    pixels = torch.zeros(1, 3, *backbone.image_size, device=backbone.device)
    features = torch.zeros(1, spm.model.text_projection.out_features, device=backbone.device)

    def several(n: int) -> tuple[Any, Any, Any]:
        return x.repeat(n, 1, 1, 1), t.repeat(n), text.repeat(n)

    def train(n: int) -> None:
        backbone.predict(*several(n)).square().mean().backward()
        for parameter in backbone.trainable_parameters():
            parameter.grad = None

    off = torch.no_grad()
    return {
        "unet": off(lambda n: backbone.predict(*several(n))),
        "unet_trained": train,
        "down": off(lambda n: down.features(*several(n))),
        "decoded": lambda n: backbone.decode(several(n)[0]),
        "scored": off(
            lambda n: spm.score_features(pixels.repeat(n, 1, 1, 1), features.repeat(n, 1), t.repeat(n))
        ),
    }


def matmul_rate(device: str, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of a product of n x n matrices: what utilisation is measured against."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = min(timed(lambda: a @ a)[1] for _ in range(5))
    return 2 * n**3 / seconds


def recipes(name: str, rate: float) -> dict[str, float]:
    """Hours of each method's published recipe (the preset) on one such card, from the FLOPs of cards.py.

    Args:
        rate: FLOP/s of the UNet.
    """
    with cards.PEAKS.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["preset"] == name]
    largest = str(max(cards.CARDS))  # which recomputes nothing
    return {
        row["stage"].removeprefix("align "): float(row["pflop"]) * 1e15 / rate / 3600
        for row in rows
        if row["stage"].startswith("align ") and row["card"] == largest
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each case, 5 without")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-gpu.md"), help="the file to write")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, in fp32")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny tries the same code on a CPU")
    device, dtype = ("cpu", torch.float32) if arguments.tiny else ("cuda", torch.bfloat16)
    found = [measure(name, arguments.tiny, device, arguments.rounds, dtype) for name in KINDS]
    arguments.page.write_text(gpu_page.render(found, arguments.tiny), encoding="utf-8")
    print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
