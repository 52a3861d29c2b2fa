"""Open a page in headless Chromium and return the document after its scripts have run, and the console's messages.

Without a browser the tests that need one are skipped, with one line in pytest's summary. Where the environment variable
OMNINORM_REQUIRE_BROWSER is 1, as in CI, they fail instead.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRE = "OMNINORM_REQUIRE_BROWSER"


class Shown(NamedTuple):
    """The document as HTML after loading, and the messages on the console."""

    dom: str
    console: list[str]

    @property
    def title(self) -> str:
        return re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)[1]

    def result(self) -> str:
        """The text that the test's script returned."""
        found = re.search(r'<body[^>]* data-result="([^"]*)"', self.dom)
        assert found, f"the test's script did not finish: {self.console}"
        return found[1]


def open_page(html: str, folder: Path, script: str = "", width: int = 1280) -> Shown:
    """Open a page from a file. Skips the test if there is no browser.

    Args:
        script: appended to the page and allowed by its policy; it may `return` a text for `Shown.result`.
    """
    browser = find_browser()
    page = folder / "shown.html"
    page.write_text(_with_script(html, script) if script else html, encoding="utf-8")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", f"--window-size={width},900",
        "--no-first-run", "--disable-background-networking", "--virtual-time-budget=10000", f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=120, check=False
    )
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line])


def find_browser() -> str:
    """Return the browser's path. Without one, skip the test, or fail it where a browser is required."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None and os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE} is 1 but there is no browser ({', '.join(NAMES)})", pytrace=False)
    if browser is None:
        # pytest's summary shows skips of one place and reason as a single line.
        pytest.skip("no browser found: to run the page tests, install one with apt-get install chromium")
    return browser


def _with_script(html: str, script: str) -> str:
    body = f"(() => {{ const result = (() => {{ {script} }})(); document.body.dataset.result = String(result); }})();"
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    allowed = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    assert allowed != html
    return allowed.replace("</body>", f"<script>{body}</script></body>")
