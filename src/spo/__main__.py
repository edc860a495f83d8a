"""Start `spo`, also as `python -m spo`: Ctrl-C is one line from here on, also while our imports run (0.2 s).

In the first 20 ms before that, Python starts, and answers Ctrl-C with its own traceback.
"""

import os
import sys


def entry() -> int:
    """Run the command line; return the exit status."""
    try:
        from spo import cli

        return cli.entry()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("spo: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
