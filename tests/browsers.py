"""Headless Chromium, if there is one here."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "no-proxy-server",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
]
MISSING = ""  # why there is none
if not importlib.util.find_spec("selenium"):
    MISSING = "selenium is not installed: pip install selenium"
elif not (CHROMIUM and DRIVER):
    MISSING = "no Chromium with chromedriver here: apt-get install chromium chromium-driver"


@contextmanager
def opened(address, profile, height=1000):
    """A driver on the page at the address, 1280 pixels wide; the test is skipped where there is no browser."""
    if MISSING:
        pytest.skip(MISSING)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"window-size=1280,{height}", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(address)
        yield driver
    finally:
        driver.quit()


@contextmanager
def drawn(page, profile):
    """A driver on a file that is one of our pages, when it has been drawn."""
    with opened(f"file://{page}", profile) as driver:
        wait(driver, lambda: driver.execute_script("return document.documentElement.dataset.ready"), 60)
        yield driver


def wait(driver, condition, seconds):
    """Until the condition holds; what it was."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda _: condition())
