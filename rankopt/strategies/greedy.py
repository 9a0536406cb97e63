"""`greedy`: AIMET's published procedure for choosing compression ratios, layer by layer measured.

Every layer is measured alone at a ladder of shares of its MACs, all other layers dense. The plan for a budget then
takes of every layer the cheapest step whose own measured loss is at most a threshold, and the threshold is the lowest
at which the budget is kept (the documentation of AIMET, "Greedy compression ratio selection"). The measurements of the
ladder are trials like any other.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rankopt.plan import DENSE, Plan
from rankopt.strategies.solved import Solved
from rankopt.strategies.strategy import Exhausted, Proposal, Setting, Standing, Strategy
from rankopt.strategies.uniform import _dense

_STEPS = 9  # shares of a layer's MACs that are tried, from a tenth to nine tenths
_ORDER = ("spatial_svd", "svd", "tucker2")  # AIMET compresses by spatial SVD


class Greedy(Strategy):
    """One method for all layers: `spatial_svd` where the space offers it."""

    name: ClassVar[str] = "greedy"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.solved = Solved(setting)
        methods = self.space.methods
        self.method = next((m for m in _ORDER if m in methods), methods[0] if methods else "")
        self.ladder = [(n, step) for n in range(len(self.space.groups)) for step in self._steps(n)]

    def propose(self, standing: Standing) -> Proposal:
        """The next step of the ladder; afterwards the plans for the budgets of `solved`."""
        known = standing.known
        if standing.number < len(self.ladder):
            return Proposal(self.alone(*self.ladder[standing.number]), self.name, probe=True)
        measured = {e.plan.digest: e.measurements.get("kl") for e in standing.entries}
        lost = {step: value for step in self.ladder if (value := measured.get(self.alone(*step).digest)) is not None}
        start = standing.number - len(self.ladder)
        for n in range(start, start + 64):
            picks = self.within(self.solved.budget(n), lost)
            if picks is not None and (plan := self.space.plan(picks)).digest not in known:
                return Proposal(plan, self.name)
        raise Exhausted("greedy: no further budget gives another plan")

    def alone(self, group: int, choice: int) -> Plan:
        """The plan in which one layer alone is compressed."""
        picks = [_dense(g) for g in self.space.groups]
        picks[group] = choice
        return self.space.plan(picks)

    def within(self, budget: float, lost: dict[tuple[int, int], float]) -> list[int] | None:
        """The plan of the lowest threshold that keeps the budget."""
        groups = self.space.groups
        for threshold in sorted(set(lost.values())):
            picks = []
            for n, group in enumerate(groups):
                good = [step for (at, step), value in lost.items() if at == n and value <= threshold]
                picks.append(min(good, key=lambda s: group.macs[s]) if good else _dense(group))
            if self.space.cost_of(picks) <= budget * self.space.totals[self.space.quantity]:
                return picks
        return None

    def _steps(self, number: int) -> list[int]:
        group = self.space.groups[number]
        own = [n for n, choice in enumerate(group.choices) if choice.method == self.method and choice != DENSE]
        keeps = group.kept
        nearest = [min(own, key=lambda n: abs(keeps[n] - k)) for k in np.linspace(0.1, 0.9, _STEPS)] if own else []
        return list(dict.fromkeys(nearest))
