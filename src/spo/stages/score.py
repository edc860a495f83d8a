"""Stage `score`: the scores of one variant's images by the scorers of `score` (in scenes, the oracle too).

The scores of each scorer are cached when they are complete, so that a killed stage resumes after them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spo.config import SCORERS, Params
from spo.runtime.files import require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.launch import is_main_process
from spo.runtime.workspace import METRICS, SCRATCH
from spo.stages.common import of_suite, run_name, stage

IMAGES, OUTPUT = Path("outputs/images"), Path("outputs/scores")
CODE = ("data", "evaluation/scoring.py", "rewards", "scenes")  # what scores the images


def run(params: Params, name: str, suite: str | None = None) -> None:
    """Write outputs/scores/NAME.csv, or outputs/scores/suites/SUITE/NAME.csv, for the variant `name`."""
    import pandas as pd

    from spo.data.images import archived
    from spo.evaluation.scoring import score_images
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

    if suite is not None:
        params.generate.check_suite(suite)
    folder = require(of_suite(IMAGES, suite) / name, f"images of {name}")
    output, title = of_suite(OUTPUT, suite), run_name(name, suite)
    with stage("score", params, title) as tracked:
        images, prompts, seeds = archived(folder)
        scratch = _scratch(params, title, folder)
        cache = CheckpointStore(scratch, keep=None)
        columns = score_images(params, images, prompts, device(), cache)
        if not is_main_process():
            return
        frame = pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})
        output.mkdir(parents=True, exist_ok=True)
        frame.to_csv(output / f"{name}.csv", index=False, float_format="%.6f")
        means = {metric: sum(values) / len(values) for metric, values in columns.items()}
        write_json(
            METRICS / f"score_{title.replace('-', '_')}.json", {k: round(v, 6) for k, v in means.items()}
        )
        tracked.log_metrics(means, step=0)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(params: Params, title: str, folder: Path) -> Path:
    """The cache of scores, named by a fingerprint of everything on which they depend."""
    pins = [Path(f"outputs/inputs/{role}.json") for role in (*SCORERS, "oracle")]
    inputs = [folder, *filter(Path.exists, pins)]
    return SCRATCH / "resume" / f"score-{fingerprint(('score', title, params.score), inputs, CODE)}"
