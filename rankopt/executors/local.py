"""`Local`: one trial after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rankopt.errors import KilledError
from rankopt.evaluate import Evaluate, Evaluation
from rankopt.executors.time_limit import OutOfTime, at_most, too_long
from rankopt.loop import Asked, Loop


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

    def ready(self) -> AbstractContextManager[None]:
        """Nothing is needed."""
        return nullcontext()

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
            with at_most(self.trial_timeout):
                outcome = loop.outcome(asked, evaluate)
        except KilledError as error:
            return loop.retry(asked, error.message)
        except OutOfTime:
            outcome = too_long(self.trial_timeout)
        loop.tell(asked, outcome)
        return None
