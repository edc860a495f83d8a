"""Find an experiment's files from the folder it runs in."""

import re
from pathlib import Path

SCRATCH = Path(".spo")
METRICS = Path("reports/metrics")
TRAINING = Path("reports/training")
EXPERIMENT = re.compile(r"/\.dvc/tmp/exps/.*")  # where DVC runs experiments, and deletes them


def home() -> Path:
    """Return the workspace: for an experiment in a temporary folder of DVC, the one that started it."""
    return Path(EXPERIMENT.sub("", str(Path.cwd())))
