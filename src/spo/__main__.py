"""The entry point of `spo` and `python -m spo`: Ctrl-C gives one line, also during our imports (0.2 s).

Before that, in the first 20 ms, Python itself answers Ctrl-C with a traceback.
"""

import os
import sys

from spo.runtime import forks


def entry() -> int:
    """Run the command line; returns the exit status."""
    try:
        if forks.SOCKET in os.environ and sys.argv[1:2] and sys.argv[1] in forks.STAGES:
            if (status := forks.ask()) is not None:
                return status
        from spo import cli

        return cli.entry()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("spo: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(entry())
