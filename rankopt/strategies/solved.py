"""`solved`: the integer program alone. Plans of least predicted loss at budgets that fill the range evenly."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np

from rankopt.plan import Plan
from rankopt.strategies.strategy import Exhausted, Proposal, Standing, Strategy

_TRIES = 64


class Solved(Strategy):
    """The first `Setting.first` budgets lie evenly between the highest and the lowest, in an order in which every
    beginning is spread over the range; those after them halve the gaps (the sequence of van der Corput)."""

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
        part = self._places[number] / max(first - 1, 1) if number < first else _van_der_corput(number - first + 1)
        return space.top - part * (space.top - space.lowest)

    @cached_property
    def _places(self) -> list[int]:
        """The order of the first budgets, 0 the highest. Under a limit that one is the answer, and the first; without
        any it is dense, of which all is known, and the last."""
        *between, lowest = spread(self.setting.first)
        limited = bool(self.space.solve(self.space.losses, self.space.top).changed())
        return [0, *between, lowest][: self.setting.first] if limited else [*between, lowest, 0][: self.setting.first]


def spread(count: int) -> list[int]:
    """1, …, count − 1: the middle, always the one that is farthest from those before it and from both ends (of equal
    ones the larger), and the last one last: ``[2, 3, 1, 4]`` for 5."""
    last = count - 1
    places = np.arange(count)
    distance = np.minimum(places, last - places)
    order: list[int] = []
    while distance.any():
        order.append(last - int(np.argmax(distance[::-1])) if order else last // 2)
        distance = np.minimum(distance, abs(places - order[-1]))
    return [*order, last]


def _van_der_corput(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, … for 1, 2, 3, 4, …"""
    value, step = 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        value, step = value + bit * step, step / 2
    return value
