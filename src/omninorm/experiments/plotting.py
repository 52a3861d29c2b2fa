"""matplotlib where it is installed, and figures that arrive whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from omninorm.errors import MissingExtraError
from omninorm.record.files import write_file, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_matplotlib(whose: str, *, otherwise: str = "") -> type[Figure]:
    """matplotlib's Figure.

    Args:
        whose: what the figure belongs to, for the message.
        otherwise: what else would help, after the installation.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = 'install it with pip install "omninorm[demo]"' + otherwise
        raise MissingExtraError(f"{whose}'s figure needs matplotlib", "an installation without it", remedy) from error
    return Figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure under a temporary name and renames it.

    Raises:
        RunError: the file can't be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with writing(path):
        write_file(path, buffer.getvalue())
