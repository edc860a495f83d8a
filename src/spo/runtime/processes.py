"""Several processes of one stage, and the processes above a stage.

A stage with `processes: N` in params.yaml runs in N processes of this machine, which torch's own launcher
starts. Those that `torchrun`, `accelerate launch` or a scheduler started, on one machine or on several, are
known by their environment: RANK and WORLD_SIZE.

DVC killed by SIGKILL or SIGTERM leaves its stages alive and writing, and so does a killed launcher. The
kernel's own signal at a parent's death is no help: the shell between DVC and the stage lives on,
and the signal follows the thread that started the process, not the process. So a thread polls the
processes above.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spo.runtime.messages import OURS, STOPPED, TRANSIENT, TransientError
from spo.runtime.signals import LAUNCHED, LAUNCHER_KILL, WATCHDOG_KILL, WATCHDOG_POLL

if TYPE_CHECKING:
    import psutil

# stages that load a model; `pairs` does for a filter or labels by a scorer. The others take one process
STAGES = ("pairs", "preference", "align", "generate", "score")
DVC_STAGE = "DVC_STAGE"  # environment: set by DVC for what it starts
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # environment: set by torch's launcher for each process


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `spo ARGUMENTS` in each of several processes; the main process writes files, tracks and prints.

    SIGTERM and Ctrl-C are a KeyboardInterrupt, after they have saved and ended.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ValueError(f"params.yaml: processes is {processes}, with {torch.cuda.device_count()} GPUs here")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reported in one line instead
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
        raise _reason(failed.failures, processes) from None
    except SignalException:
        raise KeyboardInterrupt("stopped; run it again to resume") from None
    finally:
        del os.environ[OURS]


def _reason(failures: Mapping[int, Any], processes: int) -> BaseException:
    """Return the failure to raise, of those by rank: one with a message, else a kill, else the first.

    The others may have failed because their connection to that process broke.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        failure = failures[rank]
        return "code" not in failure.error_file_data, failure.exitcode >= 0, failure.timestamp

    rank = min(failures, key=order)
    code, reported = failures[rank].exitcode, failures[rank].error_file_data
    if code == STOPPED:
        return KeyboardInterrupt("stopped; run it again to resume")
    if "code" not in reported:  # the file is not ours
        return ValueError(f"process {rank} of {processes} ended with {code}")
    return (TransientError if reported["code"] == TRANSIENT else ValueError)(reported["message"])


def is_started_by_others() -> bool:
    """Whether this is one of several processes that `launch` did not start, on this machine or on others."""
    return _is_one_of_several() and OURS not in os.environ


def _is_one_of_several() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_command(stage: str | None) -> None:
    """Refuse a command that takes one process (those of no stage do) in one of several."""
    if stage not in STAGES and _is_one_of_several():
        raise ValueError(f"only {', '.join(STAGES)} run in several processes; start this command by itself")


def is_main_process() -> bool:
    """Whether this is the only process or rank 0 of several; can be asked before they are connected."""
    return os.environ.get("RANK", "0") == "0"


def report_to_launcher(message: str, code: int) -> bool:
    """Hand an error to the launching process, which reports it once; False without a launcher."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    with open(file, "w", encoding="utf-8") as out:
        json.dump({"message": message, "code": code, "timestamp": str(int(time.time()))}, out)
    return True


def dvc_above() -> psutil.Process | None:
    """Return the nearest `dvc repro` or `dvc exp` above this process, if any."""
    import psutil

    for process in psutil.Process().parents():
        try:
            if is_dvc(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def is_dvc(command: Sequence[str]) -> bool:
    """Whether a command is `dvc repro` or `dvc exp`, started in whatever way."""
    program = (i for i, w in enumerate(command) if w == "dvc" or w.endswith(("/dvc", "/dvc/__main__.py")))
    return not {"repro", "exp"}.isdisjoint(command[next(program, len(command)) :])


@contextmanager
def tied_to_starter() -> Iterator[None]:
    """Send SIGTERM to this process when the `dvc repro` or the launcher above it exits meanwhile.

    Nothing happens to a process that neither of them started.
    """
    import psutil

    above: dict[str, psutil.Process] = {}
    if dvc := dvc_above():
        above["`dvc repro`"] = dvc
    elif DVC_STAGE in os.environ:  # it took seconds to get here
        raise ValueError("the `dvc repro` of this stage has exited: stopped before it wrote anything")
    if LAUNCHED in os.environ and (launcher := psutil.Process().parent()):
        above["launcher"] = launcher
    if not above:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(above, done), name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(above: Mapping[str, psutil.Process], done: threading.Event) -> None:
    while not done.wait(WATCHDOG_POLL):
        exited = next((name for name, process in above.items() if not _is_alive(process)), None)
        if exited is None:
            continue
        print(f"spo: the {exited} above (process {above[exited].pid}) has exited: stopping", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(WATCHDOG_KILL):
            os._exit(128 + signal.SIGTERM)
        return


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
