"""A stage in several processes on this machine (`processes` in params.yaml), by torch's own launcher."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence

STAGES = ("preference", "align", "generate", "score")  # the others take one process
GRACE = 120  # seconds to finish and save the step in hand


def wanted(stage: str, processes: int) -> bool:
    """Whether to start processes: not if this already is one of several."""
    return processes > 1 and stage in STAGES and "RANK" not in os.environ


def run(arguments: Sequence[str], processes: int) -> None:
    """`spo ARGUMENTS` in each of several processes; the first of them writes, tracks and shows.

    Raises:
        ValueError: one of them failed, with its one line; or there are fewer GPUs than processes.
        KeyboardInterrupt: SIGTERM or Ctrl-C, after they have saved and ended.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ValueError(f"params.yaml: processes is {processes}, with {torch.cuda.device_count()} GPUs here")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in one line
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "spo", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == 130:
            raise KeyboardInterrupt("stopped; run it again to go on from there") from None
        told = failure.error_file_data.get("message")
        raise ValueError(told or f"process {rank} of {processes} ended with {failure.exitcode}") from None
    except SignalException:
        raise KeyboardInterrupt("stopped; run it again to go on from there") from None


def is_main_process() -> bool:
    """Whether this is the only process or the first of several; asked before any of them is connected."""
    return os.environ.get("RANK", "0") == "0"


def tell_launcher(message: str) -> bool:
    """Hand an error to `run` in the process above, so that it is said once; False if none waits for it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    with open(file, "w", encoding="utf-8") as out:
        json.dump({"message": message, "timestamp": str(int(time.time()))}, out)
    return True
