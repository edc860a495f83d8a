"""`spo`, also as `python -m spo`: Ctrl-C is one line from here on, while our imports go on (0.2 s) as well.

What comes earlier, the first 20 ms, is Python's own start and answers with Python's own words.
"""

import os
import sys


def entry() -> int:
    """What `spo` on the command line runs; returns the exit status."""
    try:
        from spo import cli

        return cli.entry()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("spo: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
