"""Drives headless Chromium over its DevTools protocol; nothing but Chromium has to be installed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import websocket

T = TypeVar("T")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
START_TIMEOUT_S = 30.0


def program() -> str | None:
    """Path of Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page. ``problems`` holds what its console said as an error, and every uncaught exception."""

    def __init__(self, socket_url: str) -> None:
        self._socket = websocket.create_connection(socket_url, timeout=60, suppress_origin=True)
        self._number = 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        # JupyterLab's current widget is the one with the focus, and a headless page has none.
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One command; events that arrive meanwhile are looked at for problems."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": arguments}))
        while True:
            message: dict[str, Any] = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        found = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif message["method"] == "Runtime.consoleAPICalled" and found["type"] == "error":
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in found["args"]))
        elif message["method"] == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.problems.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"not true within {seconds} s: {script}")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def photograph(self, path: Path) -> None:
        """A picture of the window."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path, width: int = 1300, height: int = 1000) -> Iterator[Browser]:
    """Chromium with a profile of its own in this folder, closed afterwards."""
    path = program()
    assert path is not None
    command = [path, "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    command += ["--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")
    process = subprocess.Popen(
        [*command, "about:blank"],
        env=os.environ | {"HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = wait_for(lambda: int((folder / "DevToolsActivePort").read_text().split()[0]), process)
        pages = wait_for(lambda: _pages(port), process)
        yield Browser(pages[0]["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(20)


def _pages(port: int) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
        found = [page for page in json.load(answer) if page["type"] == "page"]
    if not found:
        raise OSError("no page yet")
    return found


def wait_for(look: Callable[[], T], process: subprocess.Popen[Any], seconds: float = START_TIMEOUT_S) -> T:
    """What ``look`` returns as soon as it raises nothing; fails where the process ends before that."""
    end = time.monotonic() + seconds
    while True:
        try:
            return look()
        except (OSError, ValueError, IndexError):
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
            assert time.monotonic() < end, f"{process.args} was not ready within {seconds} s"
            time.sleep(0.1)
