"""Text from a record, made harmless for a page, and numbers for people."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

LIMIT = 600
# Controls, formats (among them those that turn the direction of writing), surrogates, line and paragraph separators.
_HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'"}


def plain(value: Any, limit: int = LIMIT) -> str:
    """One line of visible characters, at most `limit` of them: controls become their pictures (␛ for escape)."""
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
    """`plain`, for HTML's text and quoted attributes."""
    return html.escape(plain(value, limit))


def embed(data: Any) -> str:
    """JSON that can stand in a <script> block: pure ASCII, without <, >, & or '; so neither </script>, <!-- nor a line
    separator can be in it. The characters only occur within strings, where JSON lets them be written as \\u003c."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)


def short(value: float | None, digits: int = 4) -> str:
    """A number in few characters: 0.02134, 12.5, 1,234, 3.2e-5, 1.1e12; NaN, ∞; – for None."""
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
    """ "1 step", "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
