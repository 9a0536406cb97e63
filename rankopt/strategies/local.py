"""`local`: small steps from plans on the front, chosen by what they are predicted to gain at their cost.

A trust region around a plan: a few layers may move, each by one or two levels of its own front of cost and loss. Within
it the integer program takes the moves that gain most, by losses as the measured plans correct them (see `loss_model`)
and scattered a little, since the corrections have no words for a single candidate. The region grows where a step made
the front larger and shrinks where it did not.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rankopt.plan import Plan
from rankopt.space import Near
from rankopt.strategies.fit import Fit
from rankopt.strategies.strategy import Line, Standing

_SCATTER = 0.3  # of the logarithm of a candidate's loss
_LARGEST = 8


class Local(Fit):
    """See above."""

    name: ClassVar[str] = "local"
    tries: ClassVar[int] = 24

    def attempt(self, standing: Standing, random: np.random.Generator, number: int) -> Plan | None:
        """A plan near one on the front, whose cost lies between its own and that of the next dearer one."""
        space = self.space
        line = Line.of(space, standing.entries).front()
        if not len(line.points):
            return None
        # where the staircase of the front has its widest steps, there is most to be gained
        own, costs = line.own(), line.points[:, 1]
        chance = (own + own.mean() + 1e-12) * (costs <= space.highest * 1.05)
        if not chance.any():
            return None
        at = int(random.choice(len(costs), p=chance / chance.sum()))
        dearer = float(min(costs[costs > costs[at]], default=np.inf))
        above = min(dearer, costs[at] * 1.1, space.highest)
        low = min(max(costs[at] * 0.95, space.lowest), space.highest)
        budget = float(random.uniform(low, max(above, low)))
        drawn = self.model.losses(self.model.corrections(random))
        losses = [loss * np.exp(_SCATTER * random.standard_normal(len(loss))) for loss in drawn]
        near = Near(line.entries[at].plan, int(random.integers(1, _LARGEST + 1)), int(random.integers(1, 3)))
        return space.solve(losses, budget, near)
