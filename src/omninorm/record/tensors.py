"""Open safetensors files, and read the sizes of their dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omninorm.errors import MissingExtraError, RunError

FLOATS = ("F64", "F32", "F16", "BF16")


def open_safetensors(path: Path) -> Any:
    """Open a file, for use in a `with` statement.

    Raises:
        RunError: the file is missing, truncated or damaged.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        remedy = 'Install it with pip install "omninorm[interop]"'
        raise MissingExtraError("Reading weights needs the package safetensors", "", remedy) from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        remedy = "download or save it again"
        reason = f"{' '.join(str(error).split()):.200}"  # it quotes the header, which may be long and have any content
        raise RunError(f"{path} must be a whole safetensors file", reason, remedy) from error


def bits(dtype: str) -> int:
    """Return the bits of an element: the number in the dtype's name; a bool takes a byte."""
    digits = "".join(character for character in dtype.split("_")[0] if character.isdigit())
    return int(digits) if digits else 8
