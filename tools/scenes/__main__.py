"""`python -m tools.scenes`: make the models and data of the default experiment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.scenes import STEPS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.scenes", description="About an hour on 2 cores; resumes where it was stopped."
    )
    parser.add_argument("--output", type=Path, default=Path("data"), metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=Path(".spo/scenes"), metavar="FOLDER")
    parser.add_argument("--until", choices=STEPS, help="stop after this step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        run(options.output, options.work, options.until, options.seed)
    except (ValueError, OSError) as error:
        print(f"tools.scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
