"""Handling of Ctrl-C and SIGTERM: a run finishes the current step before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context manager that stores the first SIGINT or SIGTERM in `signal`; the second one stops immediately.

    On exit the earlier handlers are restored. Outside the main thread, where Python allows no handlers, signals are not
    intercepted.

    Args:
        patient: also ignore further signals. torchrun sends again what the terminal has already sent to all processes.

    Raises:
        KeyboardInterrupt: at the second signal, at any point of the program.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signal: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif not self.patient:
            raise KeyboardInterrupt
