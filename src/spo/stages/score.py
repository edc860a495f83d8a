"""Stage `score`: the scores of one variant's images by the scorers of `score` (in scenes, the oracle too).

The scores of each scorer are cached when they are complete, so that a killed stage resumes after them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import SCORERS, Params
from spo.runtime.files import atomic, require, write_json
from spo.runtime.fingerprint import fingerprint, resume_folder
from spo.runtime.processes import is_main_process
from spo.runtime.workspace import METRICS
from spo.stages.common import NO_METRICS, NO_SCORES, NOTHING, of_suite, run_name, stage, write_nothing
from spo.tracking.provenance import versions

if TYPE_CHECKING:
    from pandas import DataFrame

    from spo.training.checkpoint import CheckpointStore

IMAGES, OUTPUT = Path("outputs/images"), Path("outputs/scores")
SCORED_BY = "scored_by"  # key of the metrics file
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "open_clip_torch", "numpy", "pillow")
CODE = ("data", "validation/scoring.py", "rewards", "scenes")  # what scores the images


def run(params: Params, name: str, suite: str | None = None) -> None:
    """Write outputs/scores/NAME.csv, or outputs/scores/suites/SUITE/NAME.csv, for the variant `name`."""
    from spo.training.checkpoint import CheckpointStore

    if suite is not None:
        params.generate.check_suite(suite)
    folder = require(of_suite(IMAGES, suite) / name, f"images of {name}")
    output, title = of_suite(OUTPUT, suite), run_name(name, suite)
    with stage("score", params, title):
        if (folder / NOTHING).exists():
            files = {output / f"{name}.csv": NO_SCORES, metrics_file(title): NO_METRICS}
            write_nothing(f"score {title}", f"there is no variant {name}", [], files)
            return
        scratch = resume_folder("score", (title, scored_by(params)), [folder], ())
        frame = table(params, folder, CheckpointStore(scratch, keep=None))
        if not is_main_process():
            return
        with atomic(output / f"{name}.csv") as partial:
            frame.to_csv(partial, index=False, float_format="%.6f", lineterminator="\n")
        means = {m: round(sum(frame[m].tolist()) / len(frame), 6) for m in frame.columns[3:]}
        write_json(metrics_file(title), {**means, SCORED_BY: scored_by(params)})
        shutil.rmtree(scratch, ignore_errors=True)


def metrics_file(title: str) -> Path:
    """The metrics of a variant's scores, with what made them by the key `scored_by`."""
    return METRICS / f"score_{title.replace('-', '_')}.json"


def table(params: Params, folder: Path, cache: CheckpointStore | None = None) -> DataFrame:
    """Score the images of a folder that `generate` wrote: index, prompt, seed, and a column per metric."""
    import pandas as pd

    from spo.data.images import archived, load_images
    from spo.training.distributed import device
    from spo.validation.scoring import score_images

    # all are read once, so that a damaged image is found before a scorer is loaded
    for _ in load_images(folder):
        pass
    images, prompts, seeds = archived(folder)
    columns = score_images(params, images, prompts, device(), cache)
    return pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})


def scored_by(params: Params) -> str:
    """A fingerprint of all that scores depend on but the images: weights, parameters, code and libraries."""
    pins = [Path(f"outputs/inputs/{role}.json") for role in (*SCORERS, "oracle")]
    return fingerprint((params.score, *libraries()), pins, CODE)


def libraries() -> list[str]:
    """The versions of the libraries that read and score images."""
    return [f"{name} {version}" for name, version in versions().items() if name in LIBRARIES]
