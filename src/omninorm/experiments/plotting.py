"""Loads matplotlib and writes figures, either completely or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from omninorm.errors import MissingExtraError
from omninorm.record.files import write_file, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_matplotlib(whose: str, *, otherwise: str = "") -> type[Figure]:
    """Return matplotlib's Figure class.

    Args:
        whose: the command or page of the figure, for the error message.
        otherwise: an alternative to the installation, appended to the remedy.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[demo]"' + otherwise
        raise MissingExtraError(f"The figure of {whose} needs matplotlib", "", remedy) from error
    return Figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure under a temporary name, then rename it.

    Raises:
        RunError: the file can't be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with writing(path):
        write_file(path, buffer.getvalue())
