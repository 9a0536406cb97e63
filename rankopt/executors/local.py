"""`Local`: one trial after the other, in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rankopt.errors import KilledError
from rankopt.evaluate import Evaluation
from rankopt.loop import Asked, Evaluate, Loop

_AGAIN_S = 10.0  # after which a trial that swallowed the alarm is told again


class Local:
    """See above.

    What a trial raises is recorded, memory that can't be had included, and the study goes on. A process that the system
    kills for its memory takes the study with it, which then has to be run again: the plan is tried once more, and given
    up when it has killed its process three times.

    Args:
        trial_timeout: seconds after which a trial is given up (None: never). Python code is interrupted, a sleep or a
            waiting for another program too; a single call into compiled code that does not return is not. It needs the
            main thread and a system with alarms, and does nothing elsewhere.
    """

    def __init__(self, trial_timeout: float | None = None) -> None:
        self.trial_timeout = trial_timeout

    def run(self, loop: Loop, evaluate: Evaluate, told: Callable[[], None]) -> None:
        """Go on until nothing is left to do."""
        while not loop.finished:
            asked = loop.ask()
            if asked is None:
                loop.wait()
                continue
            while asked is not None:
                asked = self._carry_out(loop, asked, evaluate)
            told()

    def _carry_out(self, loop: Loop, asked: Asked, evaluate: Evaluate) -> Asked | None:
        """Measure and tell; what is given back is to be tried again."""
        outcome: Evaluation | str
        try:
            with _at_most(self.trial_timeout):
                outcome = loop.outcome(asked, evaluate)
        except KilledError as error:
            return loop.retry(asked, error.message)
        except _OutOfTime:
            outcome = f"took longer than {self.trial_timeout:g} s, the time limit of a trial"
        loop.tell(asked, outcome)
        return None


class _OutOfTime(BaseException):
    """Not an `Exception`, so that what measures does not take it for a failure of its own."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise `_OutOfTime` when the block takes longer."""
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
