"""Run a stage in several processes on this machine (`processes` in params.yaml), by torch's own launcher.

Processes that `torchrun`, `accelerate launch` or a scheduler started, on one machine or on several, are known
by their environment: RANK and WORLD_SIZE.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence

from spo.runtime.exit_codes import OURS, STOPPED, TRANSIENT, TransientError
from spo.runtime.signals import LAUNCHER_KILL

MODELS = ("preference", "align", "generate", "score")  # stages that load a model
STAGES = ("pairs", *MODELS)  # `pairs` for a filter or labels by a scorer; the others take one process


def wanted(stage: str, processes: int) -> bool:
    """Whether to start processes: not if this already is one of several."""
    return processes > 1 and stage in STAGES and "RANK" not in os.environ


def run(arguments: Sequence[str], processes: int) -> None:
    """Run `spo ARGUMENTS` in each of several processes; the main process writes, tracks and shows.

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
        shutdown_timeout=int(LAUNCHER_KILL),
    )
    os.environ[OURS] = str(os.getpid())
    try:
        elastic_launch(settings, sys.executable)("-m", "spo", *arguments)
    except ChildFailedError as failed:
        print(file=sys.stderr)  # the launcher ends the others, where a progress bar may leave its line open
        rank, failure = failed.get_first_failure()
        if failure.exitcode == STOPPED:
            raise KeyboardInterrupt("stopped; run it again to resume") from None
        reported = failure.error_file_data  # ours, or torch's, which says nothing, of a killed process
        is_ours = "code" in reported
        ended = f"process {rank} of {processes} ended with {failure.exitcode}"
        message = reported["message"] if is_ours else ended
        raise (TransientError if is_ours and reported["code"] == TRANSIENT else ValueError)(message) from None
    except SignalException:
        raise KeyboardInterrupt("stopped; run it again to resume") from None
    finally:
        del os.environ[OURS]


def is_started_by_others() -> bool:
    """Whether this is one of several processes that `run` did not start, on this machine or on others."""
    return _is_one_of_several() and OURS not in os.environ


def _is_one_of_several() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_command(stage: str | None) -> None:
    """
    Args:
        stage: that the command runs; None: another command.

    Raises:
        ValueError: the command takes one process, and this is one of several.
    """
    if stage not in STAGES and _is_one_of_several():
        raise ValueError(f"only {', '.join(STAGES)} run in several processes; start this command by itself")


def is_main_process() -> bool:
    """Whether this is the only process or rank 0 of several; can be asked before they are connected."""
    return os.environ.get("RANK", "0") == "0"


def report_to_launcher(message: str, code: int) -> bool:
    """Hand an error to the launching process (`run` reports it once); False without a launcher."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    with open(file, "w", encoding="utf-8") as out:
        json.dump({"message": message, "code": code, "timestamp": str(int(time.time()))}, out)
    return True
