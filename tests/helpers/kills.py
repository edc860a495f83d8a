"""Kill `dvc repro` again and again, start it again each time, and compare with an undisturbed run.

    python tests/helpers/kills.py                                   # about 20 minutes on 2 cores
    python tests/helpers/kills.py --processes 2 --stages preference align@spo generate@spo score@spo

The smoke preset with longer trainings; 27 kills: each signal, to the stage, to dvc alone or to the whole
group, at any time, while a checkpoint is written, or just after one was. All outputs must be the same, bit
for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import clones
import psutil

from spo.runtime import signals

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("stage", "dvc", "group")
MOMENTS = ("any time", "in a write", "after a write")
LONGER = {
    "preference": {"steps": 8, "checkpoint_every": 2},
    "align": {"spo": {"iterations": 6}, "diffusion_dpo": {"iterations": 12, "checkpoint_every": 2}},
    "generate": {"batch_size": 2},
}
SPREAD = 15.0  # seconds after the start of a stage within which "any time" falls
PATIENCE = signals.FLOW_KILL  # seconds within which all must be gone: the last limit of a stop
# what Python says to a Ctrl-C in its first 20 ms, before any code of ours runs
PYTHONS_OWN_START = re.compile(
    r"""(?:Fatal\ Python\ error:\ init_.*\n.*\nTraceback.*\n | Traceback.*\n\ \ File\ ".*/bin/spo",.*\n)
    (?:(?!\ \ File\ ".*/src/spo/)\ \ .*\n)*
    KeyboardInterrupt\n""",
    re.VERBOSE,
)
# a disk so slow that kills fall into the writing of a checkpoint
SLOW_DISK = """
import os, time
def fsync(number, real=os.fsync):
    if "/.spo/resume/" in os.readlink(f"/proc/self/fd/{number}"):
        time.sleep(0.2)
    real(number)
os.fsync = fsync
"""


@dataclass(frozen=True)
class Kill:
    signal: int
    target: str
    moment: str

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} to {self.target}, {self.moment}"


@dataclass
class Outcome:
    """What a start of `dvc repro` came to; `kill` is None if it ended by itself, with `code`."""

    kill: Kill | None
    code: int
    output: str
    stage: str = ""
    gone_after: float = 0.0  # seconds from the kill until no process worked in the folder
    torn: bool = False  # a half written checkpoint was left


def workers(folder: Path) -> list[psutil.Process]:
    """All processes that work in the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition: Callable[[], bool], seconds: float, pause: float = 0.002) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause)
    return condition()


@contextlib.contextmanager
def repro(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`dvc repro` in a group of its own, and the file of what it says; nothing of it is left behind."""
    slow = folder.parent / "slow"
    slow.mkdir(exist_ok=True)
    (slow / "sitecustomize.py").write_text(SLOW_DISK)
    log = folder.parent / "output.txt"
    with log.open("wb") as output:
        options = {"env": clones.environment(folder, slow), "stdout": output, "stderr": output}
        process = subprocess.Popen(["dvc", "repro"], cwd=folder, start_new_session=True, **options)
    try:
        yield process, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stage_of(dvc: int) -> psutil.Process | None:
    """The `spo STAGE` that this dvc has started, below its shell where that stays (dash)."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(dvc).children(recursive=True):
            if any(word.endswith("/spo") for word in child.cmdline()[:3]):
                return child
    return None


def checkpoints(folder: Path) -> list[Path]:
    return _found(folder, "*.ckpt")


def partials(folder: Path) -> list[Path]:
    return _found(folder, ".*.partial")


def _found(folder: Path, name: str) -> list[Path]:
    while True:
        try:
            return list((folder / ".spo/resume").rglob(name))
        except FileNotFoundError:  # a folder was renamed meanwhile
            continue


def attempt(folder: Path, kill: Kill | None, draw: random.Random, spread: float) -> Outcome:
    """Start `dvc repro`, kill it, and wait until nothing of it is left."""
    for torn in partials(folder):
        torn.unlink()  # of the kill before
    with repro(folder) as (dvc, log):

        def ended() -> bool:
            return dvc.poll() is not None

        stage = None
        if kill is not None and _wait_for(kill.moment, folder, dvc, draw, spread):
            until(lambda: ended() or stage_of(dvc.pid) is not None, 600)
            stage = stage_of(dvc.pid)
        if kill is None or stage is None:
            code = dvc.wait(timeout=3000)
            return Outcome(None, code, log.read_text(errors="replace"))
        name = _name(stage)
        _send(kill, dvc, stage)
        if kill.target == "dvc" and kill.signal == signal.SIGINT and not until(ended, 2.0):
            os.kill(dvc.pid, signal.SIGTERM)  # dvc leaves Ctrl-C to its stage, and waits for it
        torn = bool(partials(folder)) if kill.signal == signal.SIGKILL else False
        began = time.monotonic()
        if (kill.target == "stage" or kill.signal == signal.SIGINT) and _too_late(dvc, stage):
            os.killpg(dvc.pid, signal.SIGKILL)
        if not until(lambda: ended() and not workers(folder), PATIENCE, 0.02):
            left = [" ".join(p.cmdline()) for p in workers(folder)]
            raise AssertionError(f"{kill}: still working after {PATIENCE} s: {left}")
        gone_after = time.monotonic() - began
        return Outcome(kill, dvc.wait(), log.read_text(errors="replace"), name, gone_after, torn)


def _wait_for(
    moment: str, folder: Path, dvc: subprocess.Popen[bytes], draw: random.Random, spread: float
) -> bool:
    """Whether the moment came before dvc ended."""

    def ended() -> bool:
        return dvc.poll() is not None

    if moment == "any time":
        until(lambda: ended() or stage_of(dvc.pid) is not None, 600)
        until(ended, draw.uniform(0, spread))
    elif moment == "in a write":
        until(lambda: ended() or bool(partials(folder)), 900)
    else:
        before = {(p, _time(p)) for p in checkpoints(folder)}
        until(lambda: ended() or any((p, _time(p)) not in before for p in checkpoints(folder)), 900)
        until(ended, draw.uniform(0, 0.5))
    return not ended()


def _too_late(dvc: subprocess.Popen[bytes], stage: psutil.Process) -> bool:
    """Whether the stage had done its work when the signal came (Python drops one that meets its exit),
    and dvc has begun the next."""

    def after() -> psutil.Process | None:
        return None if _lives(stage) else stage_of(dvc.pid)

    until(lambda: after() is not None or dvc.poll() is not None, PATIENCE, 0.02)
    return after() is not None


def _name(stage: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return " ".join(stage.cmdline()[-2:]).rpartition("/")[2]
    return "a stage that had ended"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _send(kill: Kill, dvc: subprocess.Popen[bytes], stage: psutil.Process) -> None:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if kill.target == "group":
            os.killpg(dvc.pid, kill.signal)
        elif kill.target == "dvc":
            os.kill(dvc.pid, kill.signal)
        else:
            stage.send_signal(kill.signal)


def series(
    folder: Path,
    kills: Sequence[Kill],
    seed: int,
    say: Callable[[str], None] = print,
    spread: float = SPREAD,
) -> list[Outcome]:
    """Kill and start again until `dvc repro` has finished; what each start came to."""
    draw, outcomes, reached = random.Random(seed), list[Outcome](), dict[Path, int]()
    for kill in [*kills, None]:
        outcome = attempt(folder, kill, draw, spread)
        outcomes.append(outcome)
        if outcome.kill is None:
            assert outcome.code == 0, f"dvc repro ended with {outcome.code}:\n{outcome.output[-3000:]}"
            say(f"finished after {len(outcomes) - 1} kills")
            return outcomes
        ours = PYTHONS_OWN_START.sub("", outcome.output)
        assert "Traceback" not in ours, f"{kill}:\n{ours[-3000:]}"
        newest = _newest(folder)
        for where, step in newest.items():
            assert step >= reached.get(where, 0), f"{kill}: a checkpoint in {where} was lost"
        reached = newest
        steps = ", ".join(f"{where.name}: {step}" for where, step in newest.items())
        say(
            f"{len(outcomes):2d}. {kill}: {outcome.stage}, gone after {outcome.gone_after:.1f} s"
            f"{', checkpoint torn' if outcome.torn else ''}; kept {steps or 'nothing'}"
        )
    raise AssertionError("unreachable")


def _newest(folder: Path) -> dict[Path, int]:
    found: dict[Path, int] = {}
    for path in checkpoints(folder):
        where = path.parent if path.parent.name != "checkpoints" else path.parent.parent
        found[where] = max(found.get(where, 0), int(path.stem))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=27)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages", nargs="*", help="run these again (DVC's names) and what follows; default: all"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work, kept; default: a temporary one")
    arguments = parser.parse_args()
    kills = [Kill(*each) for each in itertools.product(SIGNALS, TARGETS, MOMENTS)]
    random.Random(arguments.seed).shuffle(kills)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "whole"
        if not whole.exists():
            clones.fresh(whole, {**LONGER, "processes": arguments.processes})
        clones.must(whole, "dvc", "repro")
        killed = clones.copy(whole, folder / f"killed-{arguments.seed}")
        clones.forget(killed, arguments.stages)
        planned = list(itertools.islice(itertools.cycle(kills), arguments.kills))
        outcomes = series(killed, planned, arguments.seed)
        different = clones.differences(whole, killed)
        print(f"{sum(o.torn for o in outcomes)} checkpoints torn; different: {different or 'nothing'}")
        raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
