"""Escapes control characters in text from models and in file names, for terminal output."""

from __future__ import annotations


def harmless(text: str, *, one_line: bool = False) -> str:
    """Replace control characters, which could move the cursor or reprogram a terminal, with their Unicode symbols.

    Args:
        text: the text to print.
        one_line: whether line breaks and tabs are also replaced.
    """
    return "".join(_picture(character, "" if one_line else "\n\t") for character in text)


def _picture(character: str, allowed: str) -> str:
    code = ord(character)
    if character in allowed or 0x20 <= code < 0x7F or (code >= 0xA0 and not 0xD800 <= code < 0xE000):
        return character
    return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else "�"
