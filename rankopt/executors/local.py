"""`Local`: one trial after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable

from rankopt.loop import Evaluate, Loop


class Local:
    """See above."""

    def run(self, loop: Loop, evaluate: Evaluate, told: Callable[[], None]) -> None:
        """Go on until nothing is left to do; a trial that is interrupted is recorded as such, and is run again."""
        while not loop.finished:
            asked = loop.ask()
            if asked is None:
                loop.wait()
                continue
            try:
                outcome = loop.outcome(asked, evaluate)
            except KeyboardInterrupt:
                loop.interrupt()
                raise
            loop.tell(asked, outcome)
            told()
