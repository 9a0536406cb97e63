"""`solved`: the integer program alone. Plans of least predicted loss at budgets that fill the range evenly."""

from __future__ import annotations

from typing import ClassVar

from rankopt.plan import Plan
from rankopt.strategies.strategy import Exhausted, Proposal, Standing, Strategy

_TRIES = 64


class Solved(Strategy):
    """The first `Setting.first` budgets lie evenly between the highest and the lowest, ends first and then the middles;
    those after them halve the gaps (the sequence of van der Corput)."""

    name: ClassVar[str] = "solved"

    def propose(self, standing: Standing) -> Proposal:
        """The next budget whose plan is not known yet."""
        known = standing.known
        for n in range(standing.number, standing.number + _TRIES):
            plan = self.at(n)
            if plan.digest not in known:
                return Proposal(plan, self.name)
        raise Exhausted("solved: no further budget gives another plan")

    def at(self, number: int) -> Plan:
        """The plan of one of the budgets."""
        return self.space.solve(self.space.losses, self.budget(number))

    def budget(self, number: int) -> float:
        """The share of the dense cost that trial `number` may take."""
        space, first = self.space, self.setting.first
        part = _ends_first(number, first) if number < first else _van_der_corput(number - first + 1)
        return space.top - part * (space.top - space.lowest)


def _ends_first(number: int, count: int) -> float:
    """Positions 0, 1/(count−1), …, 1 in an order in which every beginning is spread over the range."""
    if count == 1:
        return 0.0
    order = sorted(range(1, count - 1), key=_van_der_corput)
    return [0, count - 1, *order][number] / (count - 1)


def _van_der_corput(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, … for 1, 2, 3, 4, …"""
    value, step = 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        value, step = value + bit * step, step / 2
    return value
