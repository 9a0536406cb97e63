"""`mixed`: several ways to move take turns, since each finds what the others do not.

Solved plans first. Then Optuna's corrections of the prediction, by turns wherever its sampler likes and where the front
has the widest gap (or at the limit); the plan that the fitted corrections make of such a gap; and a small step from the
front. What each is worth is measured in `benchmarks/search_efficiency.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rankopt.sampling import Told
from rankopt.strategies.correct import Correct
from rankopt.strategies.fit import Fit
from rankopt.strategies.local import Local
from rankopt.strategies.strategy import Proposal, Setting, Standing, Strategy


class Mixed(Strategy):
    """See above."""

    name: ClassVar[str] = "mixed"
    turns: ClassVar[Sequence[type[Strategy]]] = (Correct, Fit, Correct, Local)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.members = {way: way(setting) for way in dict.fromkeys(self.turns)}

    def propose(self, standing: Standing) -> Proposal:
        """By whoever's turn it is."""
        return self.members[self.turns[standing.number % len(self.turns)]].propose(standing)

    def told(self, proposal: Proposal, outcome: Told) -> None:
        """Everyone hears of everything."""
        for member in self.members.values():
            member.told(proposal, outcome)
