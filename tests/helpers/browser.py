"""Chromium without a window: a page as it is after its scripts have run, and what they wrote to the console."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Shown(NamedTuple):
    """The document as HTML after loading, and each message on the console."""

    dom: str
    console: list[str]

    @property
    def title(self) -> str:
        return re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)[1]

    def result(self) -> str:
        """What a test's own script left in <body data-result>."""
        found = re.search(r'<body[^>]* data-result="([^"]*)"', self.dom)
        assert found, f"the test's script did not come to its end: {self.console}"
        return found[1]


def open_page(html: str, folder: Path, script: str = "", width: int = 1280) -> Shown:
    """Opens a page from a file.

    Args:
        script: is appended and allowed by the page's policy; it may `return` a text for `Shown.result`.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.fail(f"no browser ({', '.join(NAMES)}): apt-get install --no-install-recommends chromium", pytrace=False)
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


def _with_script(html: str, script: str) -> str:
    body = f"(() => {{ const result = (() => {{ {script} }})(); document.body.dataset.result = String(result); }})();"
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    allowed = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    assert allowed != html
    return allowed.replace("</body>", f"<script>{body}</script></body>")
