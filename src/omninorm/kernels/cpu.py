"""The CPU back end: loads the library with the C++ operators of csrc/.

The library is one shared object next to this file, built at installation. If it is missing, `unavailable()` returns the
reason, and the reference is used instead. The library contains the kernels once per instruction set. The environment
variable OMNINORM_CPU chooses an instruction set; by default it is the best one that the processor supports.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from omninorm.errors import ConfigError

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_cpu.so"
# setup.py writes this file if it can't build the library; it holds the reason, in one line.
NOTE = FOLDER / "_cpu_missing.txt"


def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason."""
    if not LIBRARY.exists():
        return (
            None,
            NOTE.read_text(encoding="utf-8").strip()
            if NOTE.exists()
            else "The C++ operators have not been built. Install a C++ compiler, and then omninorm again",
        )
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
        return _declared(ctypes.CDLL(str(LIBRARY))), ""
    except OSError as error:
        return None, f"The library with the C++ operators does not load: {error}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.omninorm_runnable_set.argtypes = [ctypes.c_int]
    library.omninorm_runnable_set.restype = ctypes.c_char_p
    library.omninorm_current_set.restype = ctypes.c_char_p
    library.omninorm_use_set.argtypes = [ctypes.c_char_p]
    return library


_library, _reason = _load()


def unavailable() -> str:
    """Return why the operators can't be used on this machine; empty if they can."""
    return _reason


def instruction_sets() -> list[str]:
    """Return the instruction sets that were built and that this processor supports, best first."""
    names: list[str] = []
    while _library is not None and (name := _library.omninorm_runnable_set(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """Return the instruction set whose kernels are in use."""
    name: bytes = b"" if _library is None else _library.omninorm_current_set()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Use the kernels of this instruction set in every later call.

    Raises:
        ConfigError: there are no kernels for it, or the processor does not support it.
    """
    if _library is None or not _library.omninorm_use_set(name.encode()):
        remedy = f"choose one of {', '.join(instruction_sets())}" if _library is not None else _reason
        raise ConfigError("OMNINORM_CPU must name an instruction set of this processor", repr(name), remedy)


if _library is not None and (_wish := os.environ.get("OMNINORM_CPU")):
    use_instruction_set(_wish)
