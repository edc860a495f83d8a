"""The entry point of `spo` and `python -m spo`: Ctrl-C gives one line, also during our imports (0.2 s).

Before that, in the first 20 ms, Python itself answers Ctrl-C with a traceback.
"""

import gc
import os
import sys


def entry() -> int:
    """Run the command line; returns the exit status."""
    gc.set_threshold(10_000)  # with Python's 700, collections take a second of the imports of a stage
    try:
        from spo import cli

        return cli.main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("spo: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
