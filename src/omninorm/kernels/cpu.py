"""The CPU back end: the library with the C++ operators of csrc/.

It is one shared object beside this file, built on installation. Where it is missing, `unavailable()` says why
and the reference computes in its place. Inside it, the arithmetic exists once per instruction set; the best that
the processor has is used, or the one that the environment variable OMNINORM_CPU names.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from omninorm.errors import ConfigError

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_cpu.so"
# Written by the installation in place of the library: the reason, in one line.
NOTE = FOLDER / "_cpu_missing.txt"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if not LIBRARY.exists():
        return None, NOTE.read_text(encoding="utf-8").strip() if NOTE.exists() else "they have not been built"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
        return _declared(ctypes.CDLL(str(LIBRARY))), ""
    except OSError as error:
        return None, f"the library does not load: {error}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.omninorm_runnable_set.argtypes = [ctypes.c_int]
    library.omninorm_runnable_set.restype = ctypes.c_char_p
    library.omninorm_current_set.restype = ctypes.c_char_p
    library.omninorm_use_set.argtypes = [ctypes.c_char_p]
    return library


_library, _reason = _load()


def unavailable() -> str:
    """Why the operators can't be used here; empty if they can."""
    return _reason


def instruction_sets() -> list[str]:
    """The instruction sets that were built and that this processor has, best first."""
    names: list[str] = []
    while _library is not None and (name := _library.omninorm_runnable_set(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The instruction set whose kernels run."""
    name: bytes = b"" if _library is None else _library.omninorm_current_set()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Makes every later call run the kernels of this instruction set.

    Raises:
        ConfigError: it was not built, or the processor lacks it.
    """
    if _library is None or not _library.omninorm_use_set(name.encode()):
        remedy = f"choose one of {', '.join(instruction_sets())}" if _library is not None else _reason
        raise ConfigError("OMNINORM_CPU must name an instruction set that can run here", repr(name), remedy)


if _library is not None and (_wish := os.environ.get("OMNINORM_CPU")):
    use_instruction_set(_wish)
