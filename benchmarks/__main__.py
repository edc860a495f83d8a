"""`python -m benchmarks` (`make bench`): measure everything and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Case
    from spo.config import Params

PROMPTS, PAIRS, IMAGES, SCORED, LARGE = 4, 16, 8, 64, 4  # of a case; LARGE: images of the ViT-B/16


def main() -> None:
    """Run all cases in interleaved rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each case, 5 without")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="the file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    os.environ["TQDM_DISABLE"] = "1"  # bars of a second each
    run(arguments.rounds, arguments.page)


def run(rounds: int, page: Path) -> None:
    """Measure, print a line a case, write the page and its plot."""
    import torch

    from benchmarks import growth, memory, models
    from benchmarks.measure import compare
    from benchmarks.page import Measured, render
    from spo import config

    torch.set_num_threads(1)  # a second one waits wherever other work runs
    file = Path("params.yaml")
    params = config.load(file)
    results = []
    for case in cases(params):
        result = compare(case, rounds)
        print(f"{result.name}: {result.ratio:.2f} of {result.against}", flush=True)
        results.append(result)
    used = {side: memory.measure(file, side, PROMPTS) for side in ("ours", "official")}
    grown = growth.curves(models.load(params))
    growth.plot(grown, page.parent / "benchmarks/growth.png")
    page.write_text(render(Measured(results, used, grown, _sizes(params))), encoding="utf-8")
    print(f"wrote {page}")


def _sizes(params: Params) -> str:
    from benchmarks.spo import SHORT

    steps, first, how = SHORT["num_inference_steps"], SHORT["divert_start_step"], params.align.section("spo")
    return (
        f"Models of the default experiment. SPO: {steps} denoising steps, candidates after the first "
        f"{first}, K = {how.candidates}, {PROMPTS} prompts, all pairs valid, {how.batch_size} per update. "
        f"Images are generated in {params.generate.num_inference_steps} steps."
    )


def cases(params: Params) -> Iterator[Case]:
    """Each group with models of its own, since adapters stay on them."""
    from benchmarks import images, lpo, models, offline, spo

    scenes = models.load(params)
    yield from spo.cases(scenes, spo.settings(scenes, PROMPTS, **spo.SHORT))
    yield from lpo.cases(models.load(params), PROMPTS, spo.SHORT["num_inference_steps"])
    yield from offline.diffusion_dpo(models.load(params), PAIRS)
    yield from offline.preference_model(models.load(params), PAIRS)
    scenes = models.load(params)
    yield from images.generation(scenes, IMAGES)
    yield from images.scoring(images.scorers(params, SCORED), scenes, SCORED)
    yield from images.scoring([images.vit_b_16(scenes, LARGE)], scenes, LARGE)


if __name__ == "__main__":
    main()
