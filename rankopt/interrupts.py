"""Ctrl-C while a study runs: the first one ends it, but not while something is being written; a second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_writing = 0
_wanted = False


@contextmanager
def handled() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first Ctrl-C, at once or when what is `uninterrupted` is over.

    A second one ends the process with status 130, wherever it hangs: after the first one the system's own handling is
    in force, and where that has not even come to be handled, because compiled code does not return, a thread sees both.
    Where somebody else handles or ignores Ctrl-C, and outside of the main thread, nothing is changed.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    seen, arrived = os.pipe()
    os.set_blocking(arrived, False)
    before = signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(seen,), name="rankopt interrupts", daemon=True).start()
    signal.signal(signal.SIGINT, _first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(arrived)  # which ends the thread


def _count(seen: int) -> None:
    """End the process at the second Ctrl-C of which the system writes the number here."""
    numbers = b""
    while read := os.read(seen, 64):
        numbers += read
        if numbers.count(signal.SIGINT) > 1:
            os._exit(130)
    os.close(seen)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What is done here is done whole, unless Ctrl-C comes twice."""
    global _writing, _wanted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
    if _wanted and not _writing:
        _wanted = False
        raise KeyboardInterrupt


def _first(number: int, frame: FrameType | None) -> None:
    global _wanted
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not _writing:
        raise KeyboardInterrupt
    _wanted = True
