"""`spo` and Python files in a fork of the test process, which has the libraries: .1 s to start, not 7 s.

A process of its own otherwise: exit status, output, environment and folder. It runs this repository's code.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path


def spo(folder: Path, *arguments: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `spo ARGUMENTS` in `folder` with `variables` as its whole environment."""
    return _run("spo", folder, arguments, variables)


def python(folder: Path, file: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The same with `python FILE`."""
    return _run("python", folder, (file,), variables)


def _run(
    program: str, folder: Path, arguments: Sequence[str], variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    sys.stdout.flush(), sys.stderr.flush()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        pid = os.fork()
        if pid == 0:
            os._exit(_command(program, folder, arguments, variables, out.fileno(), err.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess([program, *arguments], code, out.read(), err.read())


def _command(
    program: str, folder: Path, arguments: Sequence[str], variables: Mapping[str, str], out: int, err: int
) -> int:
    os.dup2(out, 1), os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    try:
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            return 0
        from spo import cli

        return cli.main(arguments)
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # what Python would print at the end of a process
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
