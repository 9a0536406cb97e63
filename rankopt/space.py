"""`SearchSpace`: the candidates of every layer with their costs, and the integer program over them.

However a plan is proposed, it is solved for here: losses (as predicted, or corrected), a budget, perhaps a plan near
which it has to stay, and out comes the best plan within all limits. The two forms in which a plan can be told in
numbers are here too: a budget and corrections of the predicted losses (a logarithmic factor a stage of the network, a
role in its blocks and a method, and an exponent), and a method and a share of the dense MACs for every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankopt.allocate import Allocation, Array, Choices, Frontier, allocate, frontier
from rankopt.candidates import Group
from rankopt.errors import InfeasibleError
from rankopt.parts import roles, stages
from rankopt.picks import Picks
from rankopt.plan import Fingerprint, LayerChoice, Plan

_REACH = 1.5  # corrections go from exp(-1.5) to exp(1.5)
_EXPONENT = (0.6, 1.4)
_EXACT = ("macs", "params")
# How far below a bound on a predicted cost a plan is asked for. Times measured twice differ by about a percent: at the
# bound itself chance would decide whether a plan keeps it.
MARGIN = 0.015
_BEYOND = 0.10  # how far above its bound a budget of a predicted cost may lie
_DOUBT = 0.05  # how far above its bound a predicted cost may be, and the plan is measured all the same
_GAP = 3e-3  # to the proven optimum; losses are predicted far less closely
_MOVED = "layers moved"  # the cost of the integer program that counts them


@dataclass(frozen=True)
class Near:
    """A neighbourhood of a plan.

    Attributes:
        plan: its centre.
        layers: how many groups may choose otherwise.
        levels: how many candidates up or down each may move, on the group's own front of cost and loss.
    """

    plan: Plan
    layers: int
    levels: int = 2


class SearchSpace:
    """Losses and a budget → plan.

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
        self.picks = Picks(self.groups)
        self._keeps = [g.kept for g in self.groups]
        self.update(fixed, costs)
        self.stages, self.roles = stages(self.groups), roles(self.groups)
        self.methods = sorted({c.method for g in self.groups for c in g.choices if c.method != "dense"})
        # group → the corrections that fit it: of its stage and role, and (choices,) which of the methods' (−1: dense)
        named = (("stage", self.stages), ("role", self.roles))
        self._parts = [[f"{k}.{p}" for k, parts in named for p in parts if g.name in parts[p]] for g in self.groups]
        number = {name: n for n, name in enumerate(self.methods)}
        self._methods = [np.array([number.get(c.method, -1) for c in g.choices], dtype=np.intp) for g in self.groups]
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
        self._table = np.full((len(self.groups), max([len(g.choices) for g in self.groups], default=0)), np.nan)
        for n, group in enumerate(self.groups):
            self._table[n, : len(group.choices)] = self._choices(n).costs[self.quantity]
        self.limits = {q: self._allowed(q, bound) for q, bound in self.bounds.items()}
        for q in self.limits:
            if q not in _EXACT:  # a bound that seems out of reach is one that the cheapest plan may keep yet
                margin = MARGIN * self.bounds[q] if q != self.quantity else 0.0
                self.limits[q] = max(self.limits[q] - margin, self._least(q))

    @property
    def top(self) -> float:
        """The highest budget whose plan can be expected to keep a limit on its quantity when it is measured."""
        certain = self.exact or self.quantity not in self.bounds
        return self.highest if certain else max(self.lowest, self.highest * (1 - MARGIN))

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
        lowest = least / self.totals[q] * 1.02
        if q in self.bounds:  # far below its limit lies no answer
            lowest = max(lowest, 0.5 * highest)
        return min(lowest, highest), highest

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
        ranges |= {f"role.{name}": (-_REACH, _REACH) for name in self.roles}
        if len(self.methods) > 1:
            ranges |= {f"method.{name}": (-_REACH, _REACH) for name in self.methods}
        return ranges

    def plan_of(self, values: Mapping[str, float]) -> Plan:
        """The plan for a budget and corrections; those that are not named are neutral."""
        by_method = np.array([*(values.get(f"method.{name}", 0.0) for name in self.methods), 0.0])
        losses = []
        for group, parts, methods in zip(self.groups, self._parts, self._methods, strict=True):
            factor = sum(values.get(part, 0.0) for part in parts)
            losses.append(
                np.maximum(group.losses, 0) ** values.get("exponent", 1.0) * np.exp(factor + by_method[methods])
            )
        return self.solve(losses, values["budget"])

    @property
    def losses(self) -> list[Array]:
        """The predicted losses of every group's choices."""
        return [np.maximum(g.losses, 0) for g in self.groups]

    def solve(self, losses: Sequence[Array], budget: float, near: Near | None = None) -> Plan:
        """The plan of least summed loss within the limits.

        Args:
            losses: for every group, of each choice.
            budget: the share of the dense cost that the plan may take.
            near: a neighbourhood that it has to stay in; its centre where nothing in it keeps the limits.
        """
        if not self.groups:
            return Plan({}, self.fingerprint, self.skipped)
        q = self.quantity
        allowed = self._allowed(q, budget * self.totals[q])
        limits = {**self.limits, q: min(allowed, self.limits.get(q, np.inf)) if self.exact else allowed}
        if near is not None:
            return self._solve_near(losses, limits, near)
        choices = [self._choices(n, loss) for n, loss in enumerate(losses)]
        try:
            allocation = allocate(choices, limits, _GAP)
        except InfeasibleError:  # the budget is below what the other limits leave: the cheapest plan there is
            allocation = self._without_budget(choices)
        return self.plan(allocation.picks)

    def plan(self, picks: Sequence[int]) -> Plan:
        """The plan in which every group takes the choice of this index."""
        layers: dict[str, LayerChoice] = {}
        for group, pick in zip(self.groups, picks, strict=True):
            layers |= {layer.name: group.choices[pick] for layer in group.layers}
        return Plan(layers, self.fingerprint, self.skipped)

    def _solve_near(self, losses: Sequence[Array], limits: Mapping[str, float], near: Near) -> Plan:
        """At most so many groups move, each by at most so many levels: further costs of the integer program."""
        centre = self.picks(near.plan)
        if centre is None:
            raise ValueError("the centre of a neighbourhood must be a plan of this space")
        kept, choices = [], []
        for n, (loss, at) in enumerate(zip(losses, centre, strict=True)):
            whole = self._choices(n, loss)
            here = np.flatnonzero(abs(_levels(whole.costs[self.quantity], loss, at)) <= near.levels)
            costs = {q: v[here] for q, v in whole.costs.items()} | {_MOVED: (here != at).astype(float)}
            kept.append(here)
            choices.append(Choices(loss[here], costs))
        try:
            allocation = allocate(choices, {**limits, _MOVED: float(near.layers)}, _GAP)
        except InfeasibleError:
            return near.plan
        return self.plan([int(here[pick]) for here, pick in zip(kept, allocation.picks, strict=True)])

    def frontier(self, losses: Sequence[Array]) -> Frontier:
        """Plans along the convex hull of the budget's quantity and these losses, without the other limits."""
        return frontier([self._choices(n, loss) for n, loss in enumerate(losses)], self.quantity)

    def shares(self, costs: Array) -> Array:
        """Summed costs of the groups, in the budget's quantity, as budgets: shares of the dense cost."""
        whole = (costs + self.fixed[self.quantity]) * self.ratios.get(self.quantity, 1.0)
        return np.asarray(whole / self.totals[self.quantity])

    def _without_budget(self, corrected: Sequence[Choices]) -> Allocation:
        """The best plan within the limits; where there seems to be none, the one of least predicted cost."""
        try:
            return allocate(corrected, self.limits)
        except InfeasibleError:
            q = next((q for q in (self.quantity, *self.limits) if q not in _EXACT), self.quantity)
            cheapest = [Choices(c.costs[q], c.costs) for c in corrected]
            return allocate(cheapest, {q: limit for q, limit in self.limits.items() if q in _EXACT})

    def layer_parameters(self) -> dict[str, tuple[float, float] | tuple[str, ...]]:
        """Name → range of a plan told layer by layer: ``method.LAYER``, and ``keep.LAYER``, its share of the MACs."""
        ranges: dict[str, tuple[float, float] | tuple[str, ...]] = {}
        for group, keeps in zip(self.groups, self._keeps, strict=True):
            ranges[f"method.{group.name}"] = tuple(dict.fromkeys(c.method for c in group.choices))
            ranges[f"keep.{group.name}"] = (0.0, float(max(keeps.max(), 1.0)))
        return ranges

    def layer_numbers(self, plan: Plan) -> dict[str, float | str]:
        """A plan of this space told layer by layer; empty for another one."""
        numbers: dict[str, float | str] = {}
        picks = self.picks(plan)
        for group, keeps, pick in zip(self.groups, self._keeps, () if picks is None else picks, strict=False):
            numbers[f"method.{group.name}"] = group.choices[pick].method
            numbers[f"keep.{group.name}"] = float(keeps[pick])
        return numbers

    def plan_by_layer(self, numbers: Mapping[str, float | str]) -> Plan:
        """The plan that is told layer by layer: of the method, the candidate nearest to the share of MACs."""
        picks = []
        for group, keeps in zip(self.groups, self._keeps, strict=True):
            method, keep = numbers[f"method.{group.name}"], float(numbers[f"keep.{group.name}"])
            own = [n for n, choice in enumerate(group.choices) if choice.method == method]
            picks.append(min(own, key=lambda n: abs(keeps[n] - keep)))
        return self.plan(picks)

    def cost(self, plan: Plan) -> float:
        """What a plan costs in the budget's quantity, as predicted; NaN for choices that are no candidates."""
        picks = self.picks(plan)
        return float("nan") if picks is None else float(self.cost_of(picks))

    def cost_of(self, picks: Sequence[int] | NDArray[np.intp]) -> Array:
        """The same for the choices of these indices, (groups,) of one plan or (n, groups) of several."""
        costs = self._table[np.arange(len(self.groups)), np.asarray(picks, dtype=np.intp)]
        return np.asarray(self.fixed[self.quantity] + costs.sum(axis=-1))

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
        picks = self.picks(plan)
        if picks is None:
            return float("nan")
        return sum(float(g.losses[pick]) for g, pick in zip(self.groups, picks, strict=True))


def _levels(costs: Array, losses: Array, at: int) -> Array:
    """How many steps up or down each candidate is from candidate `at`, on the front of cost and loss through it.

    Candidates beside that front are out of reach (infinitely far), but for `at` itself.
    """
    level, best = np.full(len(costs), np.inf), np.inf
    front = []
    for i in np.lexsort((losses, costs)):
        if losses[i] < best or i == at:
            front.append(int(i))
            best = min(best, float(losses[i]))
    level[front] = np.arange(len(front)) - front.index(at)
    return level
