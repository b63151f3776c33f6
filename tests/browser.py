"""Debian's chromium without a window, for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MISSING = "no chromium and chromedriver installed: as root on Debian, `make install-browser` brings them"
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
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)


def require_browser() -> None:
    """Skip, saying why, where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(MISSING)


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A chromium with an empty profile in `profile`; its console is kept for `console`."""
    require_browser()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(
        executable_path=shutil.which("chromedriver"), env={**os.environ, "SE_OFFLINE": "true"}
    )
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(180)  # the machine may be busy
    driver.set_script_timeout(180)
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Any, page: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Open `page`, an address or a file, at a width in CSS pixels, in light or dark."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page if isinstance(page, str) else page.resolve().as_uri())


def console(driver: Any) -> list[str]:
    """What the console said since the last call."""
    return [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]
