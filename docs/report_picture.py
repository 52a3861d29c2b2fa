"""Draw the top of a report page by a headless Chromium: the verdict, the alarms, and the maps of two signals.

    python docs/report_picture.py runs/demo-1/post-rmsnorm/report.html          # docs/report.png, README's picture
    python docs/report_picture.py PAGE docs/faulty-run.png --height 1150 --maps angle stream_grad

docs/report.png shows the demo's post-norm run (`make demo`), docs/faulty-run.png the run `stalled` of
examples/find_a_fault.py.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PICTURE = Path(__file__).with_name("report.png")
STYLE = """<style>
main > section, .panel {{ display: none }}
main > #verdict, main > section[aria-labelledby=alarms-title], main > section[aria-labelledby=depth-title] {{ display: block }}
{maps} {{ display: block }}
[aria-labelledby=alarms-title] > details, footer {{ display: none }}
</style>"""


def draw(page: Path, picture: Path, width: int, height: int, maps: Sequence[str]) -> None:
    """Write the picture of `page` with the maps of these signals."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("No Chromium was found. Install chromium and run this again.")
    text = re.sub("<meta http-equiv=.Content-Security-Policy[^>]*>", "", page.read_text(encoding="utf-8"))
    style = STYLE.format(maps=", ".join(f".panel[data-name={name}]" for name in maps))
    text = text.replace("</head>", style + "</head>", 1)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "page.html"
        part.write_text(text, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=3000"]
        command = [browser, *options, f"--window-size={width},{height}", f"--screenshot={picture}", part.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the top of a report page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", default=PICTURE)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1290)
    parser.add_argument("--maps", nargs="+", default=["stream_rms", "stream_grad"], help="signals to show by layer")
    arguments = parser.parse_args()
    draw(arguments.page, arguments.picture, arguments.width, arguments.height, arguments.maps)


if __name__ == "__main__":
    main()
