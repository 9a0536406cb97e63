"""`fit`: corrections of the predicted losses are fitted to all measured plans instead of being guessed.

Every trial draws corrections that the measurements leave open (see `loss_model`), traces the best plans under them
along the whole range of budgets, and asks for the plan by which the front would grow most if the draw were true.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rankopt.errors import InfeasibleError
from rankopt.loss_model import Corrections, LossModel
from rankopt.pareto import gains
from rankopt.plan import Plan
from rankopt.strategies.budgets import focus
from rankopt.strategies.solved import Solved
from rankopt.strategies.strategy import WORST_KL, Array, Line, Proposal, Setting, Standing, Strategy


class Fit(Strategy):
    """See above."""

    name: ClassVar[str] = "fit"
    tries: ClassVar[int] = 12

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.solved, self.model = Solved(setting), LossModel(self.space.groups)

    def propose(self, standing: Standing) -> Proposal:
        """Solved plans first; then the first attempt that is not known."""
        if standing.number < self.setting.first:
            return Proposal(self.solved.at(standing.number), self.name)
        self.learn(standing)
        random = standing.random(self.setting.seed)
        known = standing.known
        for attempt in range(self.tries):
            plan = self.attempt(standing, random, attempt)
            if plan is not None and plan.digest not in known:
                return Proposal(plan, self.name)
        return self.solved.propose(standing)

    def attempt(self, standing: Standing, random: np.random.Generator, number: int) -> Plan | None:
        """The plan for a draw, or for the fit itself: at the limit, or where the front would grow most."""
        drawn = self.model.corrections(None if number == 0 and standing.number % 4 == 0 else random)
        losses = self.model.losses(drawn)
        at_limit = standing.number % 2 == 1 or standing.number >= self.setting.trials - 2
        asked = focus(standing.entries, self.space, self.setting.limits) if at_limit else None
        budget = self.widest(drawn, losses, standing) if asked is None else asked["budget"]
        return self.space.solve(losses, budget)

    def learn(self, standing: Standing) -> None:
        """Fit the corrections to everything that was measured."""
        pairs = [(e.plan, float(v)) for e in standing.entries if (v := e.measurements.get("kl")) is not None]
        self.model.fit([p for p, _ in pairs], [v for _, v in pairs])

    def widest(self, drawn: Corrections, losses: list[Array], standing: Standing) -> float:
        """The budget whose plan would add most to the area that the front dominates."""
        space = self.space
        try:
            line = space.frontier(losses)
        except InfeasibleError:
            return space.highest
        budgets, kl = space.shares(line.costs), self.model.predicted(line.losses, drawn)
        inside = (budgets >= space.lowest) & (budgets <= space.highest)
        if not inside.any():
            return space.highest
        points = Line.of(space, standing.entries).points
        gain = gains(kl[inside], budgets[inside], points, (WORST_KL, 1.0))
        return float(budgets[inside][int(np.argmax(gain))])
