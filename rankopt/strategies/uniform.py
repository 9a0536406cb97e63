"""`uniform` and `energy`: one rule for all layers, as ranks are usually chosen by hand."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from rankopt.candidates import Group
from rankopt.plan import DENSE
from rankopt.strategies.solved import Solved
from rankopt.strategies.strategy import Array, Exhausted, Proposal, Setting, Standing, Strategy

_BISECTIONS = 40


class OneRule(Strategy):
    """A number decides every layer's candidate; it is set so that the budget is kept.

    The budgets are those of `solved`, and at each the methods of the space take turns, each for all layers it fits.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.solved = Solved(setting)

    def propose(self, standing: Standing) -> Proposal:
        """The next budget and method whose plan is not known yet."""
        known = standing.known
        methods = self.space.methods
        for n in range(standing.number, standing.number + 16 * max(len(methods), 1)):
            at, turn = divmod(n, max(len(methods), 1))
            budget = self.solved.budget(at)
            picks = self.within(methods[turn], budget) if methods else None
            if picks is not None and (plan := self.space.plan(picks)).digest not in known:
                return Proposal(plan, self.name)
        raise Exhausted(f"{self.name}: no further budget gives another plan")

    def within(self, method: str, budget: float) -> list[int] | None:
        """The candidates by the most generous number that keeps the budget; None where none does."""
        low, high = 0.0, 1.0  # the most generous is 0, the least 1
        found = None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            picks = [self.choice(g, method, middle) for g in self.space.groups]
            if self.space.cost_of(picks) <= budget * self.space.totals[self.space.quantity] * (1 + 1e-12):
                found, high = picks, middle
            else:
                low = middle
        if found is None:
            picks = [self.choice(g, method, 1.0) for g in self.space.groups]
            found = picks if self.space.cost_of(picks) <= budget * self.space.totals[self.space.quantity] else None
        return found

    @abstractmethod
    def choice(self, group: Group, method: str, number: float) -> int:
        """The candidate of a group at this number between 0 (most generous) and 1."""


class Uniform(OneRule):
    """Every layer keeps the same share of its MACs."""

    name: ClassVar[str] = "uniform"

    def choice(self, group: Group, method: str, number: float) -> int:
        """The dearest candidate of the method that keeps at most this share."""
        return _dearest(group, method, 1 - number)


class Energy(OneRule):
    """Every layer keeps the same share of its weight's energy (in the metric of the data), as its spectra say."""

    name: ClassVar[str] = "energy"

    def choice(self, group: Group, method: str, number: float) -> int:
        """The cheapest candidate of the method that loses at most this share."""
        own, keeps = _own(group, method)
        if not len(own):
            return _dense(group)
        good = [n for n in own if group.energy[n] <= number]
        return min(good, key=lambda n: keeps[n]) if good else _dense(group)


def _own(group: Group, method: str) -> tuple[list[int], Array]:
    return [n for n, choice in enumerate(group.choices) if choice.method == method], group.kept


def _dearest(group: Group, method: str, share: float) -> int:
    """The dearest candidate that keeps at most a share of the MACs; the cheapest where none keeps so little."""
    own, keeps = _own(group, method)
    if not own or (DENSE in group.choices and share >= 1):
        return _dense(group)
    good = [n for n in own if keeps[n] <= share]
    return max(good, key=lambda n: keeps[n]) if good else min(own, key=lambda n: keeps[n])


def _dense(group: Group) -> int:
    """The dense choice, or where there is none the dearest candidate."""
    return group.choices.index(DENSE) if DENSE in group.choices else int(np.argmax(group.macs))
