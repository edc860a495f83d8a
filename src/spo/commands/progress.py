"""What `spo repro` prints of its stages: a line at each begin and end; all that they print is in files."""

import re
import subprocess
import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tqdm import tqdm

from spo.runtime.workspace import SCRATCH

LOGS = SCRATCH / "logs"
LAST = 8  # lines of a failed stage that are printed
BAR = re.compile(r"(?:.*:)? *\d+%\|.*\| (\d+/\d+) \[.*?(?:s/([a-z]+)|([a-z]+)/s)")  # as tqdm draws it
ENDS = {  # a line of DVC, for a stage that it does not run
    "didn't change, skipping": "is unchanged",
    "is cached - skipping run": "is restored from DVC's cache",
}


def console() -> Console:
    """Standard output for plain lines; what is no terminal gets them unwrapped."""
    found = Console(highlight=False, markup=False, emoji=False)
    found.soft_wrap = not found.is_terminal
    return found


class Progress:
    """Follows stages that run in parallel; on a terminal the last line shows how far each is.

    `seconds` gets the time of each stage that ran to its end.
    """

    def __init__(self, total: int, out: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._total, self._ended, self._out = total, 0, out
        self._started = time.monotonic()
        self._running: dict[str, str] = {}
        self.live = Live(get_renderable=self._line, console=out, refresh_per_second=2, transient=True)

    def follow(self, stage: str, process: subprocess.Popen[str]) -> int:
        """Write a stage's output to its file until it ends; return its status. Print the end of a failure."""
        assert process.stdout is not None
        self._running[stage] = ""
        self._say(f"{stage} begins")
        started, last, end = time.monotonic(), deque[str](maxlen=LAST), "done"
        LOGS.mkdir(parents=True, exist_ok=True)
        path = LOGS / f"{stage}.log"
        with path.open("w", encoding="utf-8", buffering=1) as log:
            for line in process.stdout:  # each state of a progress bar is one
                log.write(line)
                if bar := BAR.match(line):
                    self._running[stage] = f" {bar[2] or bar[3]} {bar[1]}"
                elif line.strip():
                    last.append(line.rstrip())
                    end = next((text for said, text in ENDS.items() if said in line), end)
        code, taken = process.wait(), time.monotonic() - started
        self._ended += 1
        del self._running[stage]
        if code:
            self._say(f"{stage} failed after {taken:.0f} s; {path} ends with")
            self._out.print("\n".join(f"{stage} | {line}" for line in last), soft_wrap=True)
            return code
        if end == "done":
            self.seconds[stage] = taken
        self._say(f"{stage} {end} ({taken:.0f} s; {self._ended} of {self._total})")
        return code

    def _say(self, line: str) -> None:
        self._out.print(f"{self._clock()} {line}")

    def _clock(self) -> str:
        return tqdm.format_interval(time.monotonic() - self._started)

    def _line(self) -> Text:
        running = ", ".join(f"{stage}{state}" for stage, state in list(self._running.items()))
        return Text(f"{self._clock()} {running}", no_wrap=True, overflow="ellipsis")
