"""Interrupt stores the first signal, stops at the second, and restores the earlier handlers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from omninorm.experiments import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_stored_and_the_second_stops(number):
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        os.kill(os.getpid(), number)
        assert interrupt.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_earlier_handlers_are_restored():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with contextlib.suppress(ZeroDivisionError), Interrupt():
        assert [signal.getsignal(number) for number in numbers] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before


def test_outside_the_main_thread_no_signal_is_stored():
    noted = []

    def work():
        with Interrupt() as interrupt:
            noted.append(interrupt.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [None]
