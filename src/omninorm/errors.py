"""omninorm's exceptions. The message of each states what must hold, the value received, and what to do."""

import re
from pathlib import Path

LONGEST = 1000  # characters of a problem in a message, because a damaged file may contain a name of any length


class OmninormError(Exception):
    """Base class of all errors that omninorm raises on purpose.

    `str(error)` joins the three parts into sentences:

    >>> print(ConfigError("eps must be a finite number >= 0", -1.0, "use a small positive value such as 1e-6"))
    eps must be a finite number >= 0, got -1.0. Use a small positive value such as 1e-6.

    Args:
        invariant: what must hold, or what is wrong.
        received: the value received instead; None or "" if the invariant already contains it.
        remedy: what the user can do.
    """

    def __init__(self, invariant: str, received: object, remedy: str) -> None:
        super().__init__(invariant, received, remedy)
        self.invariant = invariant
        self.received = received
        self.remedy = remedy

    def __str__(self) -> str:
        received = "" if self.received is None else str(self.received)
        problem = f"{self.invariant}, got {received}" if received else self.invariant
        problem = problem if len(problem) <= LONGEST else f"{problem[:LONGEST]} …"
        return " ".join(_sentence(part) for part in (problem, _capitalized(self.remedy)) if part)


def _capitalized(text: str) -> str:
    """Start with a capital letter, unless the first word is an identifier such as `omninorm.watch`."""
    first = text.split(maxsplit=1)[0].rstrip(",;:") if text.strip() else ""
    return text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


class ConfigError(OmninormError, ValueError):
    """A setting is unknown, out of range, or incompatible with another setting."""


class InputError(OmninormError, ValueError):
    """A tensor or an argument of a call has the wrong shape, type or value."""


class DataError(OmninormError, ValueError):
    """A training text is missing, empty or too short, or a file is not text."""


class RunError(OmninormError, RuntimeError):
    """A run's folder or a checkpoint can't be written, read or resumed."""


class MissingExtraError(OmninormError, ImportError):
    """An optional package is needed but not installed."""

    def __str__(self) -> str:
        return for_checkout(super().__str__())


def for_checkout(text: str) -> str:
    """Replace `pip install "omninorm[extra]"` in a clone of the repository by the command that installs the clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        return text
    place = "." if Path.cwd() == root else str(root)
    return re.sub(r'pip install "omninorm(?=\[)', lambda _: f'pip install -e "{place}', text)
