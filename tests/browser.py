"""A real browser: Chromium without a screen, where one is installed (REQUIRE_BROWSER: it must be)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


def chromium() -> str:
    """The program; skips, or fails where a browser is required, if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    reason = "no chromium on the PATH"
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def document(page: Path, profile: Path, *flags: str, fragment: str = "") -> str:
    """The document as it stands after the page's scripts ran, as HTML."""
    done = subprocess.run(
        [chromium(), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=10000", *flags,
         "--dump-dom", f"{page.as_uri()}{fragment}"],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return done.stdout


def title(html: str) -> str:
    """The title of a document."""
    found = re.search(r"<title>(.*?)</title>", html, re.DOTALL)
    assert found, html[:500]
    return found[1]
