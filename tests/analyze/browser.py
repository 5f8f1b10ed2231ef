"""A real Chromium without a screen and without a network."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,1500", "--enable-unsafe-swiftshader",
)  # fmt: skip


def apt_get(*words: str) -> None:
    """One at a time: tests/slurm/cluster_up.sh installs too, maybe in a process beside this one."""
    command = ["flock", "/tmp/mlm-train-apt.lock", "apt-get", *words]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=False, capture_output=True, env=environment)


def programs() -> tuple[str, str]:
    """Paths of chromium and its driver; installed from Debian where they are missing and that is possible."""
    for _ in range(2):
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium and driver:
            return chromium, driver
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            break
        apt_get("update", "-qq")
        apt_get("install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver")
    pytest.skip("needs Chromium and its driver, or root and apt-get to install them")


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A browser that records its console and what it asks of the network."""
    chromium, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="mlm-browser-", ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        opened = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield opened
        finally:
            opened.quit()
