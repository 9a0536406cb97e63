"""`Executor`: the seam for where trials are carried out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from rankopt.evaluate import Evaluate
from rankopt.loop import Loop


class Executor(Protocol):
    """Carries out the trials of a study, as many at once and wherever it likes.

    It asks the loop for trials, has their plans measured and tells the loop what became of each, in any order, all from
    the one thread in which `run` was called::

        while not loop.finished:
            while there is room and (asked := loop.ask()) is not None:
                begin to measure asked.proposal.plan   # or, if loop.recalled(asked): tell that at once
            wait for one of them, or call loop.wait() when none is under way
            loop.tell(asked, what was measured, or the reason why nothing was)
            told()

    `Loop.retry` begins a trial again whose worker died, and `Loop.interrupt` marks all that are under way when the
    study is to end now.
    """

    def ready(self) -> AbstractContextManager[None]:
        """What it needs is there inside, from before anything is measured until the winner was measured again."""

    def run(self, loop: Loop, evaluate: Evaluate, told: Callable[[], None]) -> None:
        """Go on until `loop.finished`; call `told` after every trial that was told."""
