"""Progress of counted work: a bar on a terminal, a line every 15 seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 15.0


class Counting:
    """A progress display: a context manager that is called with the current work, the number done and the total."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        columns = (BarColumn(bar_width=10), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=screen)
        self._task = self._bar.add_task("starting", total=None)
        self._last = time.monotonic()

    def __enter__(self) -> Counting:
        if self._screen.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._screen.is_terminal:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)
        if not self._screen.is_terminal and time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._screen.print(f"{done}/{total} {what}")
            self._screen.file.flush()
