"""Safetensors files: how they are opened, and what their dtypes' names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omninorm.errors import MissingExtraError, RunError

FLOATS = ("F64", "F32", "F16", "BF16")


def open_safetensors(path: Path) -> Any:
    """The open file, for `with`.

    Raises:
        RunError: the file is missing, cut off or damaged.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        remedy = "install it by `pip install 'omninorm[interop]'`"
        raise MissingExtraError(
            "reading weights needs the package safetensors", "an environment without it", remedy
        ) from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        remedy = "download or save it again"
        raise RunError(f"{path} must be a whole safetensors file", str(error), remedy) from error


def bits(dtype: str) -> int:
    """Bits of an element: the number in the name; a bool takes a byte."""
    digits = "".join(character for character in dtype.split("_")[0] if character.isdigit())
    return int(digits) if digits else 8
