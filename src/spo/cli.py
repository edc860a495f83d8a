"""The command line: no heavy import before a command runs; a failure is one line.

Exit codes: 2 for a mistake in parameters or data, 75 for a transient failure, 130 when stopped.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from spo import config
from spo.commands.arguments import STAGES, parser
from spo.runtime import cores, processes, signals
from spo.runtime.messages import (
    MISTAKE,
    STOPPED,
    LostProcessError,
    exit_code,
    first_line,
    leave_exit_code,
    redact,
)

LOST = 5.0  # seconds for a launcher to see which process ended first, while that one still exits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    typed = arguments is None  # in a process of its own
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if not processes.is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
    try:
        _run(args, arguments, typed)
    except LostProcessError as lost:
        return _end_lost(str(lost), exit_code(lost))
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(redact(str(error)), exit_code(error))
    except Exception as error:
        if (reason := _shortage(error)) is None:
            raise
        return _fail(reason, MISTAKE)
    except KeyboardInterrupt as stop:
        if processes.is_main_process():
            print(f"spo: {str(stop) or 'stopped'}", file=sys.stderr)
        return STOPPED
    return 0


def _run(args: argparse.Namespace, arguments: Sequence[str], typed: bool) -> None:
    """Run the command here, or launch the processes that run it; print the number of threads."""
    stage, dry_run = getattr(args, "stage", None), getattr(args, "dry_run", False)
    processes.check_command(None if dry_run else stage)
    number = 1 if dry_run else _processes(args, stage)
    if getattr(args, "uses_torch", False):
        threads = cores.set_threads(os.environ, number)
        if typed and not dry_run and "RANK" not in os.environ:
            print(f"spo: {threads}", file=sys.stderr)
    if number > 1:
        processes.launch(arguments, number)
        return
    if typed and stage in STAGES:
        signals.arm_ctrl_c()
    if stage and not dry_run and processes.is_started_by_others():
        from spo.runtime.workspace import SCRATCH
        from spo.training import distributed

        distributed.check_folder(SCRATCH)  # joins them before anything else can fail
    args.run(args)


def _processes(args: argparse.Namespace, stage: str | None) -> int:
    """Return how many processes to launch for this command, by params.yaml; 1: none beside this one."""
    if stage not in processes.STAGES or "RANK" in os.environ:
        return 1
    params = config.load(args.params)
    if stage == "pairs" and not (params.pairs.filter or params.preference.labels):
        return 1
    return params.processes


def _fail(reason: str, code: int) -> int:
    """Print the reason once, in the outermost process; return the exit code, which a flow gets too.

    A launcher passes on what a process hands over. Of several processes without a launcher the first of each
    machine prints it; once they have joined, each does, since it may be the only one that failed.
    """
    handed = processes.report_to_launcher(reason, code)
    if processes.is_started_by_others():
        rank, first = os.environ["RANK"], os.environ.get("LOCAL_RANK", "0") == "0"
        if first or (not handed and _has_joined()):
            print(f"spo: {reason}{'' if first else f' (process {rank})'}", file=sys.stderr)
    elif not handed:
        print(f"spo: {reason}", file=sys.stderr)
    leave_exit_code(code)
    return code


def _end_lost(reason: str, code: int) -> int:
    """Exit after another process that has printed the reason and left its exit code; unless it was killed."""
    if processes.is_started_by_others():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"spo: {reason}", file=sys.stderr)
        leave_exit_code(code, first=True)
    if processes.ERROR_FILE in os.environ:
        time.sleep(LOST)
    return code


def _has_joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _shortage(error: Exception) -> str | None:
    """One line if memory or disk space ran out; None for any other error."""
    text = first_line(error, 200)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        if "device." in text:  # the message names the key to lower
            return f"out of memory ({text})"
        advice = "lower device.pairs, device.samples and device.images in params.yaml, which change no result"
        return f"out of memory ({text}); {advice}"
    if type(error).__name__ == "SafetensorError":  # its writer raises no OSError on a full disk
        return f"weights cannot be read or written ({text})"
    return None
