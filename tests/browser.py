"""A real browser for tests: Chromium through its driver, over the W3C WebDriver protocol and the standard library."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
_DRIVERS: Final = ("chromedriver", "chromium.chromedriver")
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1100,900",
)
_ELEMENT: Final = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element


def found(names: tuple[str, ...]) -> str | None:
    return next((path for path in map(shutil.which, names) if path is not None), None)


def missing() -> str:
    """Why no browser can be driven here; empty if one can."""
    if found(_NAMES) is None:
        return "no Chromium is installed (Debian: apt-get install chromium chromium-driver)"
    return "" if found(_DRIVERS) else "no ChromeDriver is installed (Debian: apt-get install chromium-driver)"


class Browser:
    """One session of a driver."""

    def __init__(self, address: str, profile: str) -> None:
        self._address = address
        options = {"binary": found(_NAMES), "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = f"/session/{self._ask('/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def _ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        """Show a file, as a double click on it would."""
        self._ask(f"{self._session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Value that the body of a function returns in the page."""
        return self._ask(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, name: str) -> str:
        """What a reader sees of the element with this id."""
        return self.run("return document.getElementById(arguments[0]).innerText", name)

    def _element(self, name: str) -> str:
        return self._ask(f"{self._session}/element", {"using": "css selector", "value": f"#{name}"})[_ELEMENT]

    def drag(self, name: str, start: float, stop: float) -> None:
        """Press the mouse on an element at `start` of its width, from 0 to 1, move it to `stop` and let go."""
        element = self._element(name)
        self.run("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", name)
        width = self.run("return document.getElementById(arguments[0]).getBoundingClientRect().width", name)
        origin = {_ELEMENT: element}

        def move(share: float, duration: int) -> dict[str, Any]:
            at = round((share - 0.5) * width)
            return {"type": "pointerMove", "duration": duration, "x": at, "y": 0, "origin": origin}

        presses = [
            move(start, 0),
            {"type": "pointerDown", "button": 0},
            move((start + stop) / 2, 30),
            move(stop, 30),
            {"type": "pointerUp", "button": 0},
        ]
        self._ask(f"{self._session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": presses}]})

    def press(self, name: str, keys: str) -> None:
        """Type into an element; arrows are U+E012 (left), U+E014 (right), home U+E011, end U+E010."""
        self._ask(f"{self._session}/element/{self._element(name)}/value", {"text": keys})

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._ask(f"{self._session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def size(self, width: int, height: int) -> None:
        """Of the page, in its own pixels; a window cannot be as narrow as a phone."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def colours(self, scheme: str) -> None:
        """`light` or `dark`, as the reader's system says."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def messages(self) -> list[str]:
        """What the page has complained of since this was last asked: errors, blocked resources."""
        return [entry["message"] for entry in self._ask(f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.command("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def quit(self) -> None:
        self._ask(self._session, method="DELETE")


@contextmanager
def chromium() -> Generator[Browser]:
    """A browser with a new profile that is gone afterwards."""
    driver = found(_DRIVERS)
    assert driver is not None
    with tempfile.TemporaryDirectory(prefix="rematree-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            ports = (re.search(r"on port (\d+)\.", line) for line in process.stdout)
            port = next(match[1] for match in ports if match)
            browser = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield browser
            finally:
                browser.quit()
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
