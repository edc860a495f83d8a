"""Stage `score`: PickScore, HPS and aesthetic score (in scenes, the oracle too) of one variant's images.

The scores of each scorer are cached when they are complete, so that a killed stage resumes after them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spo.config import Params
from spo.runtime.files import require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.launch import is_main_process
from spo.runtime.workspace import METRICS, SCRATCH
from spo.stages.common import stage

OUTPUT = Path("outputs/scores")
CODE = ("data", "evaluation/scoring.py", "rewards", "scenes")  # what scores the images


def run(params: Params, name: str) -> None:
    """Write outputs/scores/NAME.csv for the variant `name`."""
    import pandas as pd

    from spo.data.images import load_images
    from spo.evaluation.scoring import score_images
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

    folder = require(Path("outputs/images") / name, f"images of {name}")
    with stage("score", params, name) as tracked:
        images, prompts, seeds = zip(*load_images(folder), strict=True)
        scratch = _scratch(params, folder)
        cache = CheckpointStore(scratch, keep=None)
        columns = score_images(params, list(images), list(prompts), device(), cache)
        if not is_main_process():
            return
        frame = pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})
        OUTPUT.mkdir(parents=True, exist_ok=True)
        frame.to_csv(OUTPUT / f"{name}.csv", index=False, float_format="%.6f")
        means = {metric: sum(values) / len(values) for metric, values in columns.items()}
        write_json(METRICS / f"score_{name}.json", {k: round(v, 6) for k, v in means.items()})
        tracked.log_metrics(means, step=0)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(params: Params, folder: Path) -> Path:
    """The cache of scores, named by a fingerprint of everything on which they depend."""
    roles = ("pickscore", "hps", "aesthetic", "oracle")
    inputs = [folder, *(path for role in roles if (path := Path(f"outputs/inputs/{role}.json")).exists())]
    return SCRATCH / "resume" / f"score-{fingerprint(('score', params.score), inputs, CODE)}"
