"""`correct`, the default: Optuna proposes how to correct the predicted losses, the integer program makes a plan of it.

About ten numbers whatever the network's depth: a budget, an exponent, and a logarithmic factor a stage, a role (layers
of the same name in different blocks) and a method.
Every other trial is asked for right at the limit, since that is where the answer lies. Where the corrections mean a
plan that is known, which in small spaces they often do, `fit` chooses another one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from rankopt.sampling import Number, Sampling, Told
from rankopt.strategies.budgets import focus, tightened
from rankopt.strategies.fit import Fit
from rankopt.strategies.strategy import Exhausted, Proposal, Setting, Standing, Strategy


class Correct(Strategy):
    """See above."""

    name: ClassVar[str] = "correct"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.otherwise = Fit(setting)
        self.solved = self.otherwise.solved
        ranges = self.space.parameters()
        self.sampling = Sampling(setting.sampler, ranges, len(setting.objectives), setting.trials, setting.seed)
        self._numbers: dict[str, dict[str, Number]] = {}

    def propose(self, standing: Standing) -> Proposal:
        """Solved plans first, then Optuna's."""
        number, trials = standing.number, self.setting.trials
        if number < self.setting.first:
            plan, budget = self.solved.at(number), self.solved.budget(number)
            return Proposal(plan, self.name, self.neutral(budget))
        given: dict[str, float] = {}
        if number % 2 == 1 or number >= trials - 2:
            near = number % 4 == 3 or number >= trials - 2
            asked = (near and tightened(standing.entries, self._numbers, self.space)) or focus(
                standing.entries, self.space, self.setting.limits
            )
            given = asked or {}
        numbers, marks = self.sampling.ask(number, given)
        values = {name: float(value) for name, value in numbers.items()}
        plan = self.space.plan_of(values)
        if plan.digest not in standing.known:
            return Proposal(plan, self.name, numbers, marks)
        try:
            other = self.otherwise.propose(standing)
        except Exhausted:  # a known plan costs nothing, and later corrections may find one that is not
            return Proposal(plan, self.name, numbers, marks)
        return Proposal(other.plan, other.by, numbers, marks)  # a study that is resumed has to know the numbers

    def told(self, proposal: Proposal, outcome: Told) -> None:
        """Let the sampler learn from trials that were asked for in its numbers."""
        if proposal.numbers and set(proposal.numbers) == set(self.sampling.ranges):
            own = proposal.by == self.name  # else the numbers meant another plan than this one
            if own:
                self._numbers[proposal.plan.digest] = dict(proposal.numbers)
            self.sampling.tell(outcome if own else replace(outcome, values=None))

    def neutral(self, budget: float) -> dict[str, Number]:
        """A budget, and no correction."""
        return {**{name: 1.0 if name == "exponent" else 0.0 for name in self.space.parameters()}, "budget": budget}
