"""`at_most`: the time limit of a trial, by an alarm in the process that runs it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 10.0  # after which a trial that swallowed the alarm is told again


class OutOfTime(BaseException):
    """Not an `Exception`, so that what measures does not take it for a failure of its own."""


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise `OutOfTime` when the block takes longer.

    Python code is interrupted, a sleep or a waiting for another program too; a single call into compiled code that does
    not return is not. It needs the main thread and a system with alarms, and does nothing elsewhere.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def too_long(seconds: float | None) -> str:
    """The reason of a trial that was given up."""
    return f"took longer than {seconds:g} s, the time limit of a trial"
