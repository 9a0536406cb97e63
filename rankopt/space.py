"""`SearchSpace`: the numbers that a study proposes, and the plan that they mean.

Proposed are not layers and ranks but a budget and corrections of the predicted losses: a logarithmic factor a stage of
the network and a method, and an exponent. The integer program turns them into the best plan for the corrected losses.
So every proposal is a good plan, and the study learns where the prediction is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rankopt.allocate import Allocation, Array, Choices, allocate
from rankopt.candidates import Group
from rankopt.errors import InfeasibleError
from rankopt.plan import Fingerprint, LayerChoice, Plan

_REACH = 1.5  # corrections go from exp(-1.5) to exp(1.5)
_EXPONENT = (0.6, 1.4)
_STAGES = 4
_EXACT = ("macs", "params")
MARGIN = 0.01  # how far below a bound on a predicted cost a plan is asked for
_BEYOND = 0.10  # how far above its bound a budget of a predicted cost may lie
_DOUBT = 0.05  # how far above its bound a predicted cost may be, and the plan is measured all the same


class Trial(Protocol):
    """What is needed of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """Propose a number."""


class SearchSpace:
    """Budget and corrections → plan.

    Args:
        groups: the candidates.
        fixed: quantity → what the layers outside all groups (and other operations) cost.
        totals: quantity → dense cost of the whole model.
        limits: quantity → upper bound on the whole model.
        quantity: what the budget is a share of: "macs", "params" or a predicted latency.
        fingerprint, skipped: go into every plan.
        costs: for every group, quantity → what its choices add, besides macs and params.

    Raises:
        InfeasibleError: when nothing meets the limits.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        fixed: Mapping[str, float],
        totals: Mapping[str, float],
        limits: Mapping[str, float],
        quantity: str = "macs",
        fingerprint: Fingerprint | None = None,
        skipped: Mapping[str, str] | None = None,
        costs: Sequence[Mapping[str, Array]] = (),
    ) -> None:
        self.groups, self.quantity = list(groups), quantity
        self.fingerprint, self.skipped = fingerprint, dict(skipped or {})
        self.totals, self.bounds = dict(totals), dict(limits)
        self.update(fixed, costs)
        self.stages = stages(self.groups)
        self.methods = sorted({c.method for g in self.groups for c in g.choices if c.method != "dense"})
        self.lowest, self.highest = self._range()

    def update(
        self,
        fixed: Mapping[str, float],
        costs: Sequence[Mapping[str, Array]],
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        """Take other predicted costs; `ratios`: the factor by which a quantity comes out above its prediction."""
        self.fixed, self._costs = dict(fixed), list(costs) or [{} for _ in self.groups]
        self.ratios = dict(ratios or {})
        self.limits = {q: self._allowed(q, bound) for q, bound in self.bounds.items()}
        for q in self.limits:
            if q not in _EXACT:  # a bound that seems out of reach is one that the cheapest plan may keep yet
                margin = MARGIN * self.bounds[q] if q != self.quantity else 0.0
                self.limits[q] = max(self.limits[q] - margin, self._least(q))

    def _least(self, quantity: str) -> float:
        """What the groups cost at least."""
        return float(sum(self._choices(n).costs[quantity].min() for n in range(len(self.groups))))

    def _allowed(self, quantity: str, bound: float) -> float:
        """What the groups may cost in all, when the whole model may come out at `bound`."""
        return bound / self.ratios.get(quantity, 1.0) - self.fixed[quantity]

    def _choices(self, group: int, losses: Array | None = None) -> Choices:
        return self.groups[group].as_choices(losses, self._costs[group])

    def _range(self) -> tuple[float, float]:
        """The shares of the whole model's cost between which the budget lies."""
        q = self.quantity
        if not self.groups:
            return 1.0, 1.0
        self._check_reachable()
        costs = [self._choices(n).costs[q] for n in range(len(self.groups))]
        least = self._least(q) + self.fixed[q]
        most = float(sum(c.max() for c in costs)) + self.fixed[q]
        if q not in _EXACT:  # slower than dense is no budget; and the range should not move with the prediction
            most, least = self.totals[q], 0.02 * round(least / self.totals[q] / 0.02) * self.totals[q]
        highest = min(self.bounds.get(q, most), most) / self.totals[q]
        return min(max(least / self.totals[q] * 1.02, 0.5 * highest), highest), highest

    def _check_reachable(self) -> None:
        """Predicted costs are given the benefit of the doubt, and bounds that dense keeps are not looked at."""
        limits = {q: limit for q, limit in self.limits.items() if q in _EXACT}
        for q, bound in self.bounds.items():
            if q not in _EXACT and bound < self.totals[q]:
                limits[q] = self._allowed(q, bound * (1 + _DOUBT))
        try:
            allocate([self._choices(n) for n in range(len(self.groups))], limits)
        except InfeasibleError as error:
            reach = {q: v + self.fixed[q] for q, v in error.reachable.items()}
            least = ", ".join(self._said(q, v) for q, v in reach.items())
            possible = all(error.reachable[q] <= limits[q] for q in limits)
            at_once, alone = (" at once", " (each alone)") if possible else ("", "")
            raise InfeasibleError(
                f"no plan of this search space keeps the limits{at_once}; the least is {least}{alone}", reach
            ) from None

    def _said(self, quantity: str, value: float) -> str:
        name, _, label = quantity.partition("@")
        share = f"{value / self.totals[quantity]:.1%} of dense"
        if not label:
            return f"{name} {share} ({value:.4g})"
        return f"latency@{label} {share} ({value:.4g} ms, predicted)"

    def parameters(self) -> dict[str, tuple[float, float]]:
        """Name → range of everything that is proposed."""
        # A kind of plan that comes out faster than predicted may be given a budget beyond the limit.
        beyond = self.highest if self.exact or self.quantity not in self.bounds else self.highest * (1 + _BEYOND)
        ranges = {"budget": (self.lowest, beyond), "exponent": _EXPONENT}
        if len(self.stages) > 1:
            ranges |= {f"stage.{name}": (-_REACH, _REACH) for name in self.stages}
        if len(self.methods) > 1:
            ranges |= {f"method.{name}": (-_REACH, _REACH) for name in self.methods}
        return ranges

    def suggest(self, trial: Trial) -> Plan:
        """Propose numbers and solve for the plan."""
        values = {name: trial.suggest_float(name, low, high) for name, (low, high) in self.parameters().items()}
        return self.plan_of(values)

    def plan_of(self, values: Mapping[str, float]) -> Plan:
        """The plan for these numbers; corrections that are not named are neutral."""
        if not self.groups:
            return Plan({}, self.fingerprint, self.skipped)
        q = self.quantity
        budget = self._allowed(q, values["budget"] * self.totals[q])
        limits = {**self.limits, q: min(budget, self.limits.get(q, np.inf)) if self.exact else budget}
        corrected = [self._choices(n, self._corrected(g, values)) for n, g in enumerate(self.groups)]
        try:
            allocation = allocate(corrected, limits)
        except InfeasibleError:  # the budget is below what the other limits leave: the cheapest plan there is
            allocation = self._without_budget(corrected)
        layers: dict[str, LayerChoice] = {}
        for group, pick in zip(self.groups, allocation.picks, strict=True):
            layers |= {layer.name: group.choices[pick] for layer in group.layers}
        return Plan(layers, self.fingerprint, self.skipped)

    def _without_budget(self, corrected: Sequence[Choices]) -> Allocation:
        """The best plan within the limits; where there seems to be none, the one of least predicted cost."""
        try:
            return allocate(corrected, self.limits)
        except InfeasibleError:
            q = next((q for q in (self.quantity, *self.limits) if q not in _EXACT), self.quantity)
            cheapest = [Choices(c.costs[q], c.costs) for c in corrected]
            return allocate(cheapest, {q: limit for q, limit in self.limits.items() if q in _EXACT})

    def seeds(self, count: int) -> list[dict[str, float]]:
        """Uncorrected proposals along the whole range of budgets, the largest first."""
        neutral = {name: 1.0 if name == "exponent" else 0.0 for name in self.parameters()}
        budgets = np.linspace(self.highest, self.lowest, max(count, 1))
        return [{**neutral, "budget": float(b)} for b in budgets]

    def cost(self, plan: Plan) -> float:
        """What a plan costs in the budget's quantity, as predicted; NaN for choices that are no candidates."""
        total = self.fixed[self.quantity]
        for n, group in enumerate(self.groups):
            choice = plan[group.name]
            if choice not in group.choices:
                return float("nan")
            total += float(self._choices(n).costs[self.quantity][group.choices.index(choice)])
        return total

    def tightened(self, plan: Plan, share: float) -> float:
        """The budget at which a plan of this kind, which took `share` of dense, comes out just below the limit."""
        wanted = self.cost(plan) * self.highest * (1 - MARGIN / 2) / share
        return wanted * self.ratios.get(self.quantity, 1.0) / self.totals[self.quantity]

    @property
    def exact(self) -> bool:
        """Whether the budget is of a cost that is known exactly."""
        return self.quantity in _EXACT

    def share(self, measurements: Mapping[str, float | None]) -> float:
        """The share of the dense model's cost that a measured plan takes, in the quantity of the budget; else 1."""
        value = measurements.get(self.quantity)
        if value is None:
            value = measurements.get(self.quantity.replace("latency_ms", "latency_predicted_ms"))
        return 1.0 if value is None else value / self.totals[self.quantity]

    def predicted(self, plan: Plan) -> float:
        """Sum of the predicted losses, in nats."""
        total = 0.0
        for group in self.groups:
            choice = plan[group.name]
            total += float(group.losses[group.choices.index(choice)]) if choice in group.choices else float("nan")
        return total

    def _corrected(self, group: Group, values: Mapping[str, float]) -> np.ndarray:
        losses = np.maximum(group.losses, 0) ** values.get("exponent", 1.0)
        by_stage = next((s for s, names in self.stages.items() if group.name in names), "")
        factor = values.get(f"stage.{by_stage}", 0.0)
        factors = np.array([factor + values.get(f"method.{c.method}", 0.0) for c in group.choices])
        return losses * np.exp(factors)


def stages(groups: Sequence[Group]) -> dict[str, set[str]]:
    """Names of groups by stage: runs of layers in the order of execution, cut where the output size changes most often.

    Networks whose spatial size changes are cut there; others (transformers, MLPs) into equal parts by depth.
    """
    ordered = sorted(groups, key=lambda g: g.layers[0].order)
    sizes = [g.layers[0].calls[0].out_size if g.layers[0].calls else () for g in ordered]
    distinct = list(dict.fromkeys(s for s in sizes if s))
    if 1 < len(distinct) <= 2 * _STAGES:
        found: dict[str, set[str]] = {}
        for group, size in zip(ordered, sizes, strict=True):
            found.setdefault("x".join(map(str, size)) or "linear", set()).add(group.name)
        return found
    parts = min(_STAGES, max(1, len(ordered) // 3))
    cuts = np.array_split(np.arange(len(ordered)), parts)
    return {f"part{n + 1}": {ordered[i].name for i in cut} for n, cut in enumerate(cuts) if len(cut)}
