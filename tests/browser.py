"""A real browser without a window, driven over the WebDriver protocol (W3C) with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from mdnet_dist.machine import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element's key
START_SECONDS = 60.0
QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip


class Browser:
    """Chromium, as a context manager."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        """Args: profile: an empty folder. Skips the test where there is no Chromium or no driver."""
        driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
        if not driver or not chromium:
            pytest.skip("no Chromium with its chromedriver on this machine")
        port = free_port()
        self._address = f"http://127.0.0.1:{port}"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._driver = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._session = ""
        arguments = [*QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        capabilities = {
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        try:
            self._wait()
            answer = self._call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self._stop()
            raise
        self._session = f"/{answer['sessionId']}"

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with self._open.open(f"{self._address}/status", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.1)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(20)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self._address}/session{self._session}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with self._open.open(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def go(self, page: Path) -> None:
        """Open a file."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """The value of a script that returns one; the page's policy does not bind it."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def hover(self, css: str) -> None:
        """Move the mouse onto the first element of a selector."""
        self._mouse([{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": self._element(css)}], "mouse")

    def hover_nothing(self) -> None:
        """Move the mouse into the corner."""
        self._mouse([{"type": "pointerMove", "duration": 0, "x": 1, "y": 1}], "mouse")

    def tap(self, css: str) -> None:
        """Touch an element with a finger."""
        self.run(f"document.querySelector({json.dumps(css)}).scrollIntoView({{block: 'end'}})")
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._mouse(
            [{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": self._element(css)}, *press], "touch"
        )

    def _mouse(self, actions: list[dict[str, Any]], kind: str) -> None:
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self._call("POST", "/actions", {"actions": [source]})

    def _element(self, css: str) -> dict[str, str]:
        return {ELEMENT: self._call("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]}

    def keys(self, *keys: str) -> None:
        """Press keys one after another, as characters; Tab is U+E004."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def screenshot(self, path: Path) -> None:
        """Save what is seen as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def requests(self) -> list[str]:
        """Every address that was asked for since the last call, whether it was granted or not."""
        entries = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the console says: script errors and violations of the page's policy."""
        return [entry["message"] for entry in self._log("browser")]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return self._call("POST", "/se/log", {"type": kind})
