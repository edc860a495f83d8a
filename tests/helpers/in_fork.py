"""Commands of `spo` and `dvc` in a fork of the test process, which has their libraries: .1 s to start, not 7 s.

A process of its own otherwise: exit status, output, environment and folder. It runs this repository's code.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def spo(folder: Path, *arguments: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `spo ARGUMENTS` in `folder` with `variables` as its whole environment."""
    from spo import cli

    return _captured(["spo", *arguments], lambda: cli.main(arguments), folder, variables)


def dvc(
    folder: Path, *arguments: str, variables: Mapping[str, str], stages: Path
) -> subprocess.CompletedProcess[str]:
    """Run `dvc ARGUMENTS` likewise; each stage is a fork too, of the Python script `stages`."""
    import dvc.stage.run
    from dvc.cli import main
    from dvc.stage.exceptions import StageCmdFailedError

    def run_stage(executable: str, command: str, **options: Any) -> None:
        def script() -> int:
            sys.argv = shlex.split(command)
            runpy.run_path(str(stages), run_name="__main__")
            return 0

        if code := _forked(script, options["cwd"], options["env"]):
            raise StageCmdFailedError(command, code)

    def run() -> int:
        dvc.stage.run._run = run_stage
        return main(arguments)

    return _captured(["dvc", *arguments], run, folder, variables)


def _captured(
    command: Sequence[str], main: Callable[[], int], folder: Path, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        code = _forked(main, folder, variables, (out.fileno(), err.fileno()))
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def _forked(
    main: Callable[[], int],
    folder: str | Path,
    variables: Mapping[str, str],
    outputs: tuple[int, int] = (1, 2),
) -> int:
    """Run a function in a fork; returns its exit status."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os._exit(_run(main, folder, variables, *outputs))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(
    main: Callable[[], int], folder: str | Path, variables: Mapping[str, str], out: int, err: int
) -> int:
    os.dup2(out, 1), os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    try:
        return main()
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what Python would print at the end of a process
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
