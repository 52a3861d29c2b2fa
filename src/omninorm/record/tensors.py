"""Opens safetensors files, and knows the sizes of their dtypes."""

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
        remedy = 'install it with pip install "omninorm[interop]"'
        raise MissingExtraError("Reading weights needs the package safetensors", "", remedy) from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = f"{' '.join(str(error).split()):.200}"  # it quotes the header, which may contain anything
        problem = f"{path} is not a complete safetensors file: {reason}"
        raise RunError(problem, "", "download it again, or save it again") from error


def bits(dtype: str) -> int:
    """Return the bits of an element: the number in the dtype's name, or 8 for a bool."""
    digits = "".join(character for character in dtype.split("_")[0] if character.isdigit())
    return int(digits) if digits else 8
