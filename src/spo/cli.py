"""The command line: no heavy import before a command runs; a failure is one line.

Exit codes: 2 for a mistake in parameters or data, 75 for a transient failure, 130 when stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from spo import config
from spo.commands.arguments import STAGES, parser
from spo.runtime import cores, launch, peers, signals
from spo.runtime.exit_codes import MISTAKE, STOPPED, exit_code
from spo.runtime.messages import first_line, redact


def entry() -> int:
    """Run `main` with a handler that makes sure that Ctrl-C ends a stage."""
    if sys.argv[1:2] and sys.argv[1] in STAGES:
        signals.arm_ctrl_c()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    announce = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    if not launch.is_main_process():
        os.environ["TQDM_DISABLE"] = "1"
    try:
        _run(args, arguments, announce)
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(redact(str(error)), exit_code(error))
    except Exception as error:
        if (reason := _shortage(error)) is None:
            peers.tell(first_line(error), MISTAKE)
            raise
        return _fail(reason, MISTAKE)
    except KeyboardInterrupt as stop:
        if launch.is_main_process():
            print(f"spo: {str(stop) or 'stopped'}", file=sys.stderr)
        return STOPPED
    return 0


def _run(args: argparse.Namespace, arguments: Sequence[str], announce: bool) -> None:
    """Run the command here, or launch the processes that run it; say how many threads it has."""
    launch.check_command(None if getattr(args, "dry_run", False) else getattr(args, "stage", None))
    processes = _processes(args)
    if getattr(args, "uses_torch", False):
        threads = cores.set_threads(os.environ, processes)
        if announce and not getattr(args, "dry_run", False) and "RANK" not in os.environ:
            print(f"spo: {threads}", file=sys.stderr)
    if processes > 1:
        signals.disarm_ctrl_c()  # no deadline: the processes may need time to save
        launch.run(arguments, processes)
    else:
        if launch.is_started_by_others() and not getattr(args, "dry_run", True):
            _join()
        args.run(args)


def _join() -> None:
    """Join the other processes before anything can fail, so that an error of one ends all."""
    from spo.runtime.workspace import SCRATCH
    from spo.training import distributed

    distributed.state()
    distributed.check_folder(SCRATCH)


def _processes(args: argparse.Namespace) -> int:
    """Return how many processes to launch for this command, by params.yaml; 1: none beside this one."""
    stage = getattr(args, "stage", None)
    if stage not in launch.STAGES or args.dry_run:
        return 1
    params = config.load(args.params)
    if stage == "pairs" and not (params.pairs.filter or params.preference.labels):
        return 1
    return params.processes if launch.wanted(stage, params.processes) else 1


def _fail(reason: str, code: int) -> int:
    """Say the reason once, in the outermost process; return the exit code, which a flow gets too."""
    peers.fail(reason, code)
    return code


def _shortage(error: Exception) -> str | None:
    """One line if memory or disk space ran out; None for any other error."""
    text = first_line(error, 200)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        if "device." in text:  # it says which key to lower
            return f"out of memory ({text})"
        advice = "lower device.pairs, device.samples and device.images in params.yaml, which change no result"
        return f"out of memory ({text}); {advice}"
    if type(error).__name__ == "SafetensorError":  # its writer raises no OSError on a full disk
        return f"weights cannot be read or written ({text})"
    return None
