"""A headless Chromium, driven through the DevTools protocol over two pipes: real clicks and keys, no driver.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
KEYS = {  # key: (code, its number, the text that it enters)
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "/": ("Slash", 191, "/"),
}
PAINTED = "performance.getEntriesByType('paint').length > 0"  # before it Chromium drops clicks and keys


class Browser:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer = write, read, b""
        self._numbers, self._session = itertools.count(1), ""
        self.requested: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events on the way are noted."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        params = answer.get("params", {})
        if answer.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        if answer.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", ""))
        return answer

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")  # else a new #fragment alone would load nothing
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        self.wait(PAINTED)

    def value(self, script: str) -> Any:
        """What a script gives; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, wanted: Any = True) -> None:
        """Wait until a script gives what is wanted: the browser may act on an event after it was sent."""
        end = time.monotonic() + 600
        while (value := self.value(script)) != wanted:
            assert time.monotonic() < end, f"{script} is {value!r}, not {wanted!r}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Press the left button in the middle of an element, after scrolling to it."""
        # prompts out of view have no layout (content-visibility): once drawn they move what is below them
        x, y = self.value(f"""(async () => {{
            const found = document.querySelector({json.dumps(selector)});
            const box = () => found.getBoundingClientRect();
            let before;
            do {{
                found.scrollIntoView({{ block: "center" }});
                before = box();
                for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
            }} while (box().x !== before.x || box().y !== before.y || box().width !== before.width);
            return [before.x + before.width / 2, before.y + before.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        code, number, text = KEYS[key]
        fields = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def becomes(self, expression: str, expected: Any, seconds: float = 60) -> bool:
        """Whether an expression has this value soon: text is empty until the page is drawn again."""
        end = time.monotonic() + seconds
        while (found := self.value(expression)) != expected and time.monotonic() < end:
            time.sleep(0.05)
        assert found == expected
        return True

    def choose(self, name: str, value: str) -> None:
        """Choose an option of a select element, as its menu does."""
        self.value(f"""(() => {{
            const menu = document.querySelector('select[name="{name}"]');
            menu.value = {json.dumps(value)};
            menu.dispatchEvent(new Event("input", {{ bubbles: true }}));
        }})()""")

    def size(self, width: int, height: int, phone: bool = False) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **screen)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start a browser with its profile in `folder`; the test is skipped without one."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    (commands, to_browser), (from_browser, answers) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
    # the browser reads commands from file 3 and writes answers to file 4
    given = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (commands, answers)]
    shell = f'exec 3<&{given[0]} 4>&{given[1]}; exec "$0" "$@"'
    with subprocess.Popen(
        ["bash", "-c", shell, program, *options],
        pass_fds=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        for pipe in (commands, answers, *given):
            os.close(pipe)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            os.close(to_browser)
            os.close(from_browser)
            process.terminate()
