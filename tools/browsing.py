"""Chromium without a screen, for tests and screenshots of the live page.

Needs Debian's packages chromium and chromium-driver, and selenium (the extra ``browser``).
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Literal

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@contextmanager
def open_browser() -> Iterator[Chrome]:
    """A browser with a profile of its own, which logs its console and its network traffic."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        raise FileNotFoundError("no chromium: apt-get install chromium chromium-driver")
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = Chrome(options, Service(driver))
        try:
            yield browser
        finally:
            browser.quit()


def set_screen(
    browser: Chrome,
    width: int,
    height: int,
    *,
    scheme: Literal["light", "dark"] = "light",
    scale: float = 1.0,
    calm: bool = False,
) -> None:
    """A screen of so many CSS pixels; ``calm``: its user wants no motion."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600},
    )
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def picture(browser: Chrome) -> bytes:
    """The whole page as a PNG, also what is below the screen."""
    taken = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
    )
    return base64.b64decode(taken["data"])


def console_errors(browser: Chrome) -> list[str]:
    """What the console has complained of since the last call."""
    return [
        entry["message"]
        for entry in browser.get_log("browser")
        # It also tells whoever reads the canvas how that would be faster.
        if entry["level"] != "INFO" and entry["source"] != "rendering"
    ]


def requested(browser: Chrome) -> list[str]:
    """The URLs that were asked for since the last call."""
    events: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
    ]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and not event["params"]["documentURL"].startswith("chrome")
    ]
