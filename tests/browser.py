"""A headless Chromium, driven over the WebDriver protocol with nothing but the standard library.

Debian's chromedriver has the version of its chromium, and gives computed labels and roles by the standard.
Playwright would add a Node runtime to the installation, and is built for browser builds of its own.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, from the WebDriver standard
ENTER, ESCAPE, SHIFT, RELEASE = "\ue007", "\ue00c", "\ue008", "\ue000"
_FLAGS = [
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--force-device-scale-factor=1", "--no-first-run", "--no-default-browser-check"),
    # Nothing but what the page itself does.
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-quic"),
]


class Browser:
    """One window. Its profile and everything else that it writes lies in `folder`.

    It resolves no name: a page that it shows works without any network but the loopback.
    """

    def __init__(self, folder: Path) -> None:
        if not (CHROMIUM and CHROMEDRIVER):
            pytest.skip("no browser here: install Debian's packages chromium and chromium-driver")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._root = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [CHROMEDRIVER, f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder), "TMPDIR": str(folder)},
        )
        try:
            wait(lambda: self._call("GET", "/status")["ready"], "chromedriver is ready")
            flags = [
                *_FLAGS,
                f"--user-data-dir={folder / 'profile'}",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ]
            if os.geteuid() == 0:
                flags.append("--no-sandbox")
            always = {
                "browserName": "chrome",
                "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
            self._root += "/session/" + session["sessionId"]
        except BaseException:
            self._process.kill()
            raise

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._root + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._call("DELETE", "")
        self._process.terminate()
        self._process.wait(10)

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of an async function `script` returns in the page; `arguments` is its array."""
        script = f"return (async function() {{ {script} }}).apply(null, arguments)"
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _element(self, css: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        return "/element/" + found[_ELEMENT]

    def click(self, css: str) -> None:
        self._call("POST", self._element(css) + "/click")

    def type(self, css: str, text: str) -> None:
        """Key strokes; into a file input, the path of a file."""
        self._call("POST", self._element(css) + "/value", {"text": text})

    def label(self, css: str) -> str:
        """The name that a screen reader says."""
        return self._call("GET", self._element(css) + "/computedlabel")

    def role(self, css: str) -> str:
        return self._call("GET", self._element(css) + "/computedrole")

    def text(self, css: str) -> str:
        """What the first such element shows; nothing where there is none."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def shown(self, css: str) -> bool:
        return self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", css)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """Messages of the console since the last call: errors of the script, refusals by the policy."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]


def wait(condition: Callable[[], Any], what: str, seconds: float = 20) -> None:
    """`condition` holds; a server that does not answer yet counts as not yet."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.05)
