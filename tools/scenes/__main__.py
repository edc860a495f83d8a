"""`python -m tools.scenes`: make the models and data of the default experiment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tools.scenes import STEPS, Build, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.scenes",
        description="About three hours on 2 cores; resumes where it was stopped.",
    )
    parser.add_argument("--output", type=Path, default=Path("data"), metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path(".spo/scenes"), metavar="FOLDER")
    parser.add_argument("--until", choices=STEPS, help="stop after this step")
    parser.add_argument("--only", choices=STEPS, help="this step alone; what it needs must be there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="that draw images, one thread each")
    parser.add_argument("--threads", type=int, default=2, help="of everything else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    build = Build(options.output, options.work, options.seed, options.processes)
    try:
        run(build, options.until, options.only)
    except (ValueError, OSError) as error:
        print(f"tools.scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
