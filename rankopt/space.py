"""`SearchSpace`: the numbers that a study proposes, and the plan that they mean.

Proposed are not layers and ranks but a budget and corrections of the predicted losses: a logarithmic factor a stage of
the network and a method, and an exponent. The integer program turns them into the best plan for the corrected losses.
So every proposal is a good plan, and the study learns where the prediction is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from rankopt.allocate import allocate
from rankopt.candidates import Group
from rankopt.errors import InfeasibleError
from rankopt.plan import Fingerprint, LayerChoice, Plan

_REACH = 1.5  # corrections go from exp(-1.5) to exp(1.5)
_EXPONENT = (0.6, 1.4)
_STAGES = 4


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
        limits: quantity → upper bound on the whole model, exact costs only.
        quantity: what the budget is a share of: "macs" or "params".
        fingerprint, skipped: go into every plan.

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
    ) -> None:
        self.groups, self.quantity = list(groups), quantity
        self.fingerprint, self.skipped = fingerprint, dict(skipped or {})
        self.fixed, self.totals = dict(fixed), dict(totals)
        self.limits = {q: bound - fixed[q] for q, bound in limits.items()}
        self.stages = stages(self.groups)
        self.methods = sorted({c.method for g in self.groups for c in g.choices if c.method != "dense"})
        self.lowest, self.highest = self._range()

    def _range(self) -> tuple[float, float]:
        """The shares of the whole model's cost between which the budget lies."""
        q = self.quantity
        if not self.groups:
            return 1.0, 1.0
        self._check_reachable()
        costs = [g.as_choices().costs[q] for g in self.groups]
        least = float(sum(c.min() for c in costs)) + self.fixed[q]
        most = float(sum(c.max() for c in costs)) + self.fixed[q]
        limit = self.limits[q] + self.fixed[q] if q in self.limits else most
        highest = min(limit, most) / self.totals[q]
        return min(max(least / self.totals[q] * 1.02, 0.5 * highest), highest), highest

    def _check_reachable(self) -> None:
        try:
            allocate([g.as_choices() for g in self.groups], self.limits)
        except InfeasibleError as error:
            reach = {q: v + self.fixed[q] for q, v in error.reachable.items()}
            known = ", ".join(f"{q} {reach[q] / self.totals[q]:.1%} of dense ({reach[q]:.4g})" for q in reach)
            raise InfeasibleError(
                f"no plan of this search space keeps the limits; the least is {known}", reach
            ) from None

    def parameters(self) -> dict[str, tuple[float, float]]:
        """Name → range of everything that is proposed."""
        ranges = {"budget": (self.lowest, self.highest), "exponent": _EXPONENT}
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
        budget = values["budget"] * self.totals[q] - self.fixed[q]
        limits = {**self.limits, q: min(budget, self.limits.get(q, np.inf))}
        corrected = [g.as_choices(self._corrected(g, values)) for g in self.groups]
        try:
            allocation = allocate(corrected, limits)
        except InfeasibleError:  # the budget is below what the other limits leave: the cheapest plan there is
            allocation = allocate(corrected, self.limits)
        layers: dict[str, LayerChoice] = {}
        for group, pick in zip(self.groups, allocation.picks, strict=True):
            layers |= {layer.name: group.choices[pick] for layer in group.layers}
        return Plan(layers, self.fingerprint, self.skipped)

    def seeds(self, count: int) -> list[dict[str, float]]:
        """Uncorrected proposals along the whole range of budgets, the largest first."""
        neutral = {name: 1.0 if name == "exponent" else 0.0 for name in self.parameters()}
        budgets = np.linspace(self.highest, self.lowest, max(count, 1))
        return [{**neutral, "budget": float(b)} for b in budgets]

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
