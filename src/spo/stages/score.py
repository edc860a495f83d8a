"""Stage `score`: PickScore, HPS and aesthetic (in scenes, the oracle too) of one variant's pictures.

Each scorer's numbers are kept as soon as they are there, so that a stage that was killed goes on after them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from spo.config import Params
from spo.runtime.files import require, write_json
from spo.runtime.fingerprint import fingerprint
from spo.runtime.launch import is_main_process
from spo.runtime.workspace import METRICS, SCRATCH
from spo.stages.common import stage

if TYPE_CHECKING:
    pass

OUTPUT = Path("outputs/scores")
CODE = ("data", "evaluation/scoring.py", "rewards", "scenes")  # that scores


def run(params: Params, item: str) -> None:
    import pandas as pd

    from spo.data import images
    from spo.evaluation.scoring import score_images
    from spo.training.checkpoint import CheckpointStore
    from spo.training.distributed import device

    folder = require(Path("outputs/images") / item, f"pictures of {item}")
    with stage("score", params, item) as tracked:
        pictures, prompts, seeds = zip(*images.load_images(folder), strict=True)
        scratch = _scratch(params, folder)
        kept = CheckpointStore(scratch, keep=None)
        columns = score_images(params, list(pictures), list(prompts), device(), kept)
        if not is_main_process():
            return
        frame = pd.DataFrame({"index": range(len(prompts)), "prompt": prompts, "seed": seeds, **columns})
        OUTPUT.mkdir(parents=True, exist_ok=True)
        frame.to_csv(OUTPUT / f"{item}.csv", index=False, float_format="%.6f")
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        write_json(METRICS / f"score_{item}.json", {k: round(v, 6) for k, v in means.items()})
        tracked.log_metrics(means, step=0)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(params: Params, folder: Path) -> Path:
    """Where the numbers of these very pictures are kept: named by all that they are made from."""
    roles = ("pickscore", "hps", "aesthetic", "oracle")
    inputs = [folder, *(path for role in roles if (path := Path(f"outputs/inputs/{role}.json")).exists())]
    return SCRATCH / "resume" / f"score-{fingerprint(('score', params.score), inputs, CODE)}"
