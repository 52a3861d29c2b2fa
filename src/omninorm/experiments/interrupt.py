"""Handling of Ctrl-C and SIGTERM: a run ends after the current step instead of in the middle of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context manager in which the first SIGINT or SIGTERM is only stored in `signal`; the second stops immediately.

    The earlier handlers are restored on exit. Outside the main thread, where Python allows no handlers, signals are not
    intercepted.

    Args:
        patient: ignore further signals as well: torchrun repeats those that the terminal has already sent to all.

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
