"""`relinearize`: losses predicted anew around plans on the front, with the compressed layers in place.

A few steps are then taken from each such plan: the integer program within a trust region, cheaper and dearer by some
percent. The plan at which the predictions are made anew is the one around which the front has most to gain.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from rankopt.plan import Plan
from rankopt.result import Entry
from rankopt.sampling import Told
from rankopt.space import Near
from rankopt.strategies.fit import Fit
from rankopt.strategies.strategy import Array, Line, Proposal, Setting, Standing

_STEPS = 6  # plans that are proposed from one set of predictions
_SHIFTS = (1.0, 0.96, 1.04, 0.92, 1.08, 0.98)  # their budgets, as multiples of the centre's cost
_LAYERS = (0.3, 0.6, 1.0)  # how many layers may move, as a share of all


class Relinearize(Fit):
    """See above. Without `Setting.sensitivities` it is `fit`."""

    name: ClassVar[str] = "relinearize"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._around: dict[str, list[Array]] = {}  # plan digest → predicted changes
        self._used: dict[str, int] = {}  # plan digest → steps taken from it
        self._centre: Entry | None = None
        self._last = ""

    def propose(self, standing: Standing) -> Proposal:
        """A step from the present centre, or from a new one."""
        if standing.number < self.setting.first or self.setting.sensitivities is None:
            return super().propose(standing)
        known = standing.known
        for _ in range(3 * _STEPS):
            plan = self._step(standing)
            if plan is None:
                break
            if plan.digest not in known:
                centre = "" if self._centre is None else self._centre.plan.digest
                return Proposal(plan, self.name, marks={"centre": centre, "used": self._used.get(centre, 0)})
        return super().propose(standing)

    def told(self, proposal: Proposal, outcome: Told) -> None:
        """Note how many steps were taken from which plan, for a study that is resumed."""
        if proposal.by == self.name and "centre" in proposal.marks:
            self._used[str(proposal.marks["centre"])] = int(proposal.marks["used"])
            self._last = str(proposal.marks["centre"])

    def _step(self, standing: Standing) -> Plan | None:
        if self._centre is None and self._last:
            self._centre = next((e for e in standing.entries if e.plan.digest == self._last), None)
        centre = self._centre
        if centre is None or self._used.get(centre.plan.digest, 0) >= _STEPS:
            centre = self._centre = self._next(standing)
        if centre is None or self.setting.sensitivities is None:
            return None
        digest = centre.plan.digest
        if digest not in self._around:
            self._around = {digest: list(self.setting.sensitivities(centre.plan))}
        step = self._used.get(digest, 0)
        self._used[digest] = step + 1
        share = self.space.share(centre.measurements)
        budget = min(max(share * _SHIFTS[step % _STEPS], self.space.lowest), self.space.highest)
        moving = max(1, round(len(self.space.groups) * _LAYERS[step % len(_LAYERS)]))
        losses = [np.where(np.isfinite(v), v, 1e3) for v in self._around[digest]]
        return self.space.solve(losses, budget, Near(centre.plan, moving, 2))

    def _next(self, standing: Standing) -> Entry | None:
        """The plan of the front that was stepped from least, and of those the one in the widest part of the front."""
        line = Line.of(self.space, standing.entries).front()
        fresh = [
            n for n, e in enumerate(line.entries) if self._used.get(e.plan.digest, 0) < _STEPS and e.plan.changed()
        ]
        if not fresh:
            return None
        own = line.own()
        return line.entries[max(fresh, key=lambda n: float(own[n]))]
