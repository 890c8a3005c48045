"""A headless Chromium, driven through its DevTools pipe without further dependencies."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
VARIABLE = "MQUANT_BROWSER"
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
          "--no-first-run", "--hide-scrollbars", "--window-size=900,900")  # fmt: skip


def find_browser() -> str | None:
    """Path of the browser: ``$MQUANT_BROWSER``, or the first of the usual names found."""
    named = os.environ.get(VARIABLE)
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. Commands and replies are JSON messages that end with a NUL byte."""

    def __init__(self, out: int, into: Any):
        self._out, self._in = out, into
        self._ids = itertools.count(1)
        self._session: str | None = None
        self.errors: list[str] = []  # uncaught exceptions of the page's scripts

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; return its result."""
        number = next(self._ids)
        command: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def run(self, script: str) -> Any:
        """Evaluate a JavaScript expression; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> Any:
        """Poll an expression until it is true; return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser ended"
            data += byte
        return json.loads(data)


@contextmanager
def page(browser: str, folder: Path) -> Iterator[Page]:
    """A tab of a new browser with its profile in ``folder``."""
    command_in, command_out = os.pipe()
    answer_in, answer_out = os.pipe()

    # The protocol uses file descriptors 3 and 4.
    wired = f'exec "$0" "$@" 3</dev/fd/{command_in} 4>/dev/fd/{answer_out}'
    command = ["sh", "-c", wired, browser, *_FLAGS, f"--user-data-dir={folder}"]
    with subprocess.Popen(
        command, pass_fds=(command_in, answer_out), stderr=subprocess.DEVNULL
    ) as process:
        os.close(command_in)
        os.close(answer_out)
        with os.fdopen(answer_in, "rb") as answers:
            try:
                tab = Page(command_out, answers)
                tab.attach()
                yield tab
            finally:
                process.terminate()
                os.close(command_out)
