"""All stages again and again in one process: memory, open files and temporary files must not grow.

    python tests/helpers/soak.py FOLDER --rounds 3      # FOLDER: a clone with data and a params.yaml

Says what part of each round tracking took, too.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import tracking_cost

from spo import cli, config

STAGES: tuple[tuple[str, ...], ...] = (
    *(("inputs",), ("prompts",), ("pairs",), ("preference",)),
    *(("preference", item) for item in ("latent", "unconditioned", "clean_only")),
    *(("align", method) for method in config.METHODS),
    *(("generate", variant) for variant in config.VARIANTS),
    *(("score", variant) for variant in config.VARIANTS),
    ("report",),
)


@dataclass(frozen=True)
class Use:
    """What the process holds after a round."""

    seconds: float
    tracking: float  # percent of them
    megabytes: float  # resident
    open_files: int
    threads: int
    children: int
    temporary: int  # files and folders of this process's temporary folder
    state: int  # files under .spo


def use(seconds: float, tracking: float) -> Use:
    gc.collect()
    process, scratch = psutil.Process(), Path(".spo")
    return Use(
        seconds=round(seconds, 1),
        tracking=round(100 * tracking / seconds, 2),
        megabytes=round(process.memory_info().rss / 1e6, 1),
        open_files=process.num_fds(),
        threads=process.num_threads(),
        children=len(process.children(recursive=True)),
        temporary=sum(1 for _ in Path(tempfile.gettempdir()).iterdir()),
        state=sum(p.is_file() for p in scratch.rglob("*")),
    )


def rounds(
    n: int, stages: Iterable[tuple[str, ...]] = STAGES, say: Callable[[str], None] = print
) -> list[Use]:
    """Run the stages n times in the working directory; what the process holds after each round."""
    uses = []
    for number in range(1, n + 1):
        began = time.monotonic()
        with tracking_cost.measured() as cost:
            for stage in stages:
                if status := cli.main(stage):
                    raise RuntimeError(f"spo {' '.join(stage)} ended with {status}")
        uses.append(use(time.monotonic() - began, cost.seconds))
        say(f"round {number}: {', '.join(f'{k} {v}' for k, v in asdict(uses[-1]).items())}")
    return uses


def growth(uses: list[Use], megabytes: float) -> list[str]:
    """What the last round holds more of than the second (the first loads libraries and fills caches)."""
    second, last = uses[1], uses[-1]
    names = ("open_files", "threads", "children", "temporary", "state")
    found = [
        f"{k}: {getattr(second, k)} to {getattr(last, k)}"
        for k in names
        if getattr(last, k) > getattr(second, k)
    ]
    if last.megabytes > second.megabytes + megabytes:
        found.append(f"megabytes: {second.megabytes} to {last.megabytes}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="*", metavar="STAGE", help="some only, as align@spo; default: all")
    parser.add_argument("--megabytes", type=float, default=50, help="growth that is none")
    arguments = parser.parse_args()
    os.chdir(arguments.folder)
    with tempfile.TemporaryDirectory() as own:
        tempfile.tempdir = own
        stages = [tuple(name.split("@")) for name in arguments.stages] if arguments.stages else STAGES
        uses = rounds(arguments.rounds, stages, lambda line: print(line, file=sys.stderr))
        found = growth(uses, arguments.megabytes)
    print(f"grew: {', '.join(found) or 'nothing'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
