"""A headless Chromium, where the system has one; `chromium` and `chromium-driver` are Debian's packages."""

import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_READY_SECONDS = 60.0


class Browser:
    """One page at a time, with its requests and the messages on its console."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Show `file` and wait until its plots are drawn."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": scheme})
        self.driver.get("about:blank")
        self.requests(), self.console()  # drop those of the previous page
        self.driver.get(file.as_uri())
        self.wait("return document.documentElement.dataset.ready === 'yes'")

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def wait(self, code: str, *arguments: Any) -> None:
        """Wait until `code` returns a true value."""
        end = time.monotonic() + _READY_SECONDS
        while not self.js(code, *arguments):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """Addresses that the page requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("about:", "data:", "blob:"))]

    def console(self) -> list[str]:
        """Messages on the console since the last call."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def pdf(self, width: float, height: float) -> bytes:
        """The page as PDF, on paper of this size in inches."""
        options = {"paperWidth": width, "paperHeight": height, "printBackground": True}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", options)["data"])

    def pointer(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        for dx in (-3, 0):  # one event alone does not count as a movement
            event = {"type": "mouseMoved", "x": x + dx, "y": y}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    driver_path = shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    yield Browser(driver)
    driver.quit()
