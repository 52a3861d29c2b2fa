"""The time that tests wait for other processes: far longer than a busy machine needs."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 600.0  # seconds


def wait_until(condition: Callable[[], bool], running: Callable[[], bool] = lambda: True, pause: float = 0.02) -> bool:
    """Return True once the condition is true, or False if `running` turns false before.

    Raises:
        AssertionError: neither happened in ten minutes.
    """
    end = time.monotonic() + PATIENCE
    while running():
        if condition():
            return True
        assert time.monotonic() < end, "the test has waited for ten minutes in vain"
        time.sleep(pause)
    return False
