"""The HTML document around a page: its policy, style, script and data, and the refresh of a page that grows."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from omninorm.errors import RunError
from omninorm.record.files import write_file, writing
from omninorm.report.text import embed, escape

_SCRIPTS = ("base.js", "figure.js", "map.js", "line.js", "alarms.js", "tables.js", "refresh.js", "main.js")
_POLICY = "default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def document(title: str, name: str, main: str, data: Mapping[str, Any], refresh: float | None = None) -> str:
    """Return the page as text. Its policy allows only its own script and style, by their hashes, and no connections.

    Args:
        title: of the window, unescaped.
        name: of the run, unescaped.
        main: the content as HTML.
        data: what the script draws.
        refresh: seconds after which a browser loads the page again; None for never.
    """
    style, script = _template("page.css"), "(() => {\n'use strict';\n" + "".join(map(_template, _SCRIPTS)) + "})();\n"
    # With JavaScript the script reloads the page instead, and keeps the scroll position.
    reload = f'<noscript><meta http-equiv="refresh" content="{max(1, round(refresh))}"></noscript>' if refresh else ""
    slots = {
        "policy": _POLICY.format(script=_hash(script), style=_hash(style)),
        "refresh": reload,
        "title": escape(title, 160),
        "style": style,
        "name": escape(name, 120),
        "main": main,
        "data": embed({**data, "refresh": refresh}),
        "script": script,
    }
    return fill("page.html", slots)


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Replace the slots of a template in a single pass, so that the inserted text is not searched for slots."""
    return _SLOT.sub(lambda match: slots[match[1]], _template(template))


def write_document(content: str, out: str | Path) -> Path:
    """Write a page; an existing one is replaced atomically.

    Raises:
        RunError: the page can't be written.
    """
    target = Path(out)
    if target.exists() and target.resolve().suffix == ".jsonl":
        # A record that was given as the output by mistake could not be restored.
        raise RunError(f"The page would overwrite the record {target}", "", "name another file, such as report.html")
    with writing(target):
        write_file(target, content.encode())
    return target


def _template(name: str) -> str:
    return (files("omninorm.report") / "template" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
