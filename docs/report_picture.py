"""Draw docs/report.png: the verdict, the alarms and two maps of a report page, by a headless Chromium.

    python docs/report_picture.py runs/demo-1/post-rmsnorm/report.html

The page is that of the demo's post-norm run (`make demo`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).with_name("report.png")
WIDTH, HEIGHT = 1100, 1290
STYLE = """<style>
main > section { display: none }
main > #verdict, main > section[aria-labelledby=alarms-title], main > section[aria-labelledby=depth-title] { display: block }
[aria-labelledby=alarms-title] > details, [aria-labelledby=depth-title] .panel:nth-child(n+3), footer { display: none }
</style>"""


def main(page: Path) -> None:
    """Write the picture of `page`."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("No Chromium was found. Install chromium and run this again.")
    text = re.sub("<meta http-equiv=.Content-Security-Policy[^>]*>", "", page.read_text(encoding="utf-8"))
    text = text.replace("</head>", STYLE + "</head>", 1)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "page.html"
        part.write_text(text, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=3000"]
        command = [browser, *options, f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={PICTURE}", part.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python docs/report_picture.py PAGE")
    main(Path(sys.argv[1]))
