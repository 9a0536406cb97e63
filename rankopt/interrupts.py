"""Ctrl-C while a study runs: the first one ends it, but not while something is being written; a second one at once."""

from __future__ import annotations

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

    After it the system's own handling is in force, so that a second one ends the process wherever it hangs. Where
    somebody else handles or ignores Ctrl-C, and outside of the main thread, nothing is changed.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
