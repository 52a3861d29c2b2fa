"""Escape text from a record for the page, and format numbers."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

LIMIT = 600
# Control and format characters (which can reverse the writing direction), surrogates, line and paragraph separators.
_HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'"}


def plain(value: Any, limit: int = LIMIT) -> str:
    """Return one line of at most `limit` visible characters; control characters become symbols (␛ for escape)."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _HARMFUL:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def escape(value: Any, limit: int = LIMIT) -> str:
    """Return `plain` text escaped for HTML text and quoted attributes."""
    return html.escape(plain(value, limit))


def embed(data: Any) -> str:
    """Return JSON that is safe in a <script> block: ASCII without <, >, & or ', so that it cannot contain </script>,
    <!-- or a line separator. These characters occur only in strings, where JSON allows the form \\u003c."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)


def short(value: float | None, digits: int = 4) -> str:
    """Format a number compactly: 0.02134, 12.5, 1,234, 3.2e-5, 1.1e12; NaN, ∞; – for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", f"{value:.{digits}g}")


def plural(number: int, noun: str) -> str:
    """Return a count with its noun: "1 step", "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
