"""`allocate`: the plan with the least predicted loss under every limit, as a multiple-choice knapsack.

One binary variable a candidate; one candidate a group of layers; one row a limit. Solved by HiGHS through SciPy.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankopt.errors import InfeasibleError

Array = NDArray[np.float64]
_NEVER = 1e300  # costs and losses that no plan has; infinite ones would give NaN
_STARTS = 6  # plans of the frontier below a limit that are filled up, for an upper bound


@dataclass(frozen=True)
class Choices:
    """The candidates of one group of layers that choose together.

    Attributes:
        losses: (n,) predicted loss of each candidate.
        costs: quantity → (n,) what each candidate costs.
    """

    losses: Array
    costs: Mapping[str, Array]

    def __post_init__(self) -> None:
        if len(self.losses) == 0 or not np.isfinite(self.losses).all():
            raise ValueError("every group needs at least one candidate, and finite losses")


@dataclass(frozen=True)
class Allocation:
    """A solution: the index of each group's candidate, the summed loss, and the summed costs."""

    picks: tuple[int, ...]
    loss: float
    costs: Mapping[str, float]


def allocate(groups: Sequence[Choices], limits: Mapping[str, float], gap: float = 1e-4) -> Allocation:
    """Minimize the summed loss with every summed cost at or below its limit.

    Args:
        groups: the candidates.
        limits: quantity → upper bound on its sum over all groups.
        gap: relative gap to the proven optimum at which the solver may stop.

    Raises:
        InfeasibleError: with the least that each limited quantity can reach.
    """
    reachable = {q: float(sum(g.costs[q].min() for g in groups)) for q in limits}
    broken = [q for q in limits if reachable[q] > limits[q] * (1 + 1e-12) + 1e-9]
    if broken:
        q = broken[0]
        raise InfeasibleError(f"{q} can't be brought below {reachable[q]:.6g}, the limit is {limits[q]:.6g}", reachable)
    kept, picks = _narrowed(groups, limits, gap)
    if picks is None:
        kept = [k[_undominated(_part(g, k), tuple(limits))] for g, k in zip(groups, kept, strict=True)]
        picks = _solve(groups, kept, limits, gap)
    if picks is None:
        text = ", ".join(f"{q} <= {limits[q]:.6g} (alone {reachable[q]:.6g} is possible)" for q in limits)
        raise InfeasibleError(f"no plan keeps all limits at once: {text}", reachable)
    costs = {q: float(sum(g.costs[q][p] for g, p in zip(groups, picks, strict=True))) for q in groups[0].costs}
    return Allocation(picks, float(sum(g.losses[p] for g, p in zip(groups, picks, strict=True))), costs)


def allocate_front(
    groups: Sequence[Choices], limits: Mapping[str, float], quantity: str, bounds: Sequence[float], gap: float = 1e-4
) -> list[Allocation]:
    """The plans for several bounds on one quantity, within the other limits; bounds nothing can meet are left out."""
    found: dict[tuple[int, ...], Allocation] = {}
    for bound in bounds:
        tightened = {**limits, quantity: min(bound, limits.get(quantity, np.inf))}
        try:
            allocation = allocate(groups, tightened, gap)
        except InfeasibleError:
            continue
        found.setdefault(allocation.picks, allocation)
    return list(found.values())


@dataclass(frozen=True)
class Frontier:
    """Plans along the lower convex hull of one quantity against the summed loss, from the cheapest to the least loss.

    Each is optimal at its own cost. They are what the linear relaxation of the integer program goes through (Sinha and
    Zoltners, "The multiple-choice knapsack problem", 1979): between two neighbours one group has moved one step.

    Attributes:
        costs: (n,) of the quantity, rising.
        losses: (n,) falling.
        moved: (n,) the group that moved (the first entry stands for the start, −1).
        to: (n,) the candidate that it moved to.
        start: the candidate of every group in the cheapest plan.
    """

    costs: Array
    losses: Array
    moved: NDArray[np.intp]
    to: NDArray[np.intp]
    start: NDArray[np.intp]

    def picks(self, index: int) -> tuple[int, ...]:
        """The candidate of every group in one of the plans."""
        found = self.start.copy()
        for group, candidate in zip(self.moved[1 : index + 1], self.to[1 : index + 1], strict=True):
            found[group] = candidate
        return tuple(int(i) for i in found)


def frontier(groups: Sequence[Choices], quantity: str) -> Frontier:
    """All plans on the convex hull of a quantity and the loss, without other limits, in one sweep."""
    table = _Table.of(groups)
    cost, loss = table.costs[quantity], table.losses
    # along the lower left hull of every group at once: from where it stands to where the loss falls most for its cost
    cheapest = np.where(cost == cost.min(axis=1, keepdims=True), loss, np.inf)
    start = at = cheapest.argmin(axis=1)
    rows = np.arange(len(groups))
    steps: list[tuple[Array, NDArray[np.intp], NDArray[np.intp], Array, Array]] = []
    while True:
        more, less = cost - cost[rows, at][:, None], loss[rows, at][:, None] - loss
        steeper = (more > 0) & (less > 0)
        slope = np.where(steeper, less / np.where(steeper, more, 1.0), -np.inf)
        best = slope.max(axis=1)
        moving = np.flatnonzero(best > 0)
        if not len(moving):
            break
        # of candidates on one line the farthest, so that a step is never cut in two
        to = np.where(slope >= best[:, None] * (1 - 1e-12), cost, -np.inf).argmax(axis=1)
        steps.append((best[moving], moving, to[moving], more[moving, to[moving]], less[moving, to[moving]]))
        at = np.where(best > 0, to, at)
    slopes, moved, to, more, less = (np.concatenate([s[k] for s in steps]) if steps else np.zeros(0) for k in range(5))
    order = np.argsort(-slopes, kind="stable")
    costs = float(cost[rows, start].sum()) + np.cumsum(np.append(0.0, more[order]))
    losses = float(loss[rows, start].sum()) - np.cumsum(np.append(0.0, less[order]))
    first = np.array([-1], dtype=np.intp)
    moved, to = (np.append(first, v[order].astype(np.intp)) for v in (moved, to))
    return Frontier(costs, losses, moved, to, start)


@dataclass(frozen=True)
class _Table:
    """All groups at once, (groups, most candidates); beyond a group's own candidates both are `_NEVER`."""

    losses: Array
    costs: Mapping[str, Array]

    @classmethod
    def of(cls, groups: Sequence[Choices]) -> _Table:
        sizes = np.array([len(g.losses) for g in groups])
        own = np.arange(sizes.max(initial=0))[None, :] < sizes[:, None]

        def filled(values: Sequence[Array]) -> Array:
            whole = np.full(own.shape, _NEVER)
            whole[own] = np.concatenate(values)
            return whole

        costs = {q: filled([g.costs[q] for g in groups]) for q in groups[0].costs}
        return cls(filled([g.losses for g in groups]), costs)


def _narrowed(
    groups: Sequence[Choices], limits: Mapping[str, float], gap: float
) -> tuple[list[NDArray[np.intp]], tuple[int, ...] | None]:
    """Candidates that can be part of an optimum, and the optimum itself where it is plain already.

    Every limit alone, taken into the objective at the price at which the frontier crosses it, bounds the loss from
    below (Lagrangian relaxation); plans of the frontier just within it, filled up greedily, bound it from above where
    they keep the other limits too. A candidate whose choice would lift the lower bound above the upper one is out. Of
    4,000 candidates some hundred are left, and the solver is done in milliseconds.
    """
    kept = [np.arange(len(g.losses)) for g in groups]
    best, upper = None, np.inf
    reduced: list[tuple[float, list[Array]]] = []
    table = _Table.of(groups)
    for q, limit in limits.items():
        line = frontier(groups, q)
        at = int(np.searchsorted(line.costs, limit * (1 + 1e-12) + 1e-9, side="right")) - 1
        if at < 0:
            continue
        price = 0.0
        if at + 1 < len(line.costs):
            price = (line.losses[at] - line.losses[at + 1]) / (line.costs[at + 1] - line.costs[at])
        priced = [g.losses + price * g.costs[q] for g in groups]
        lower = float(sum(p.min() for p in priced)) - price * limit
        reduced.append((lower, [p - p.min() for p in priced]))
        for back in range(min(_STARTS, at + 1)):
            picks = _filled(table, line.picks(at - back), limits)
            if picks is not None and _keeps(groups, picks, limits):
                loss = float(sum(g.losses[p] for g, p in zip(groups, picks, strict=True)))
                if loss < upper:
                    best, upper = picks, loss
    if best is None:
        return kept, None
    slack = 1e-9 * max(abs(upper), 1e-300)
    for lower, above in reduced:
        if upper - lower <= gap * abs(upper) + slack:
            return kept, best
        kept = [k[(lower + a[k] <= upper + slack) | (k == p)] for k, a, p in zip(kept, above, best, strict=True)]
    return kept, None


def _filled(table: _Table, picks: Sequence[int], limits: Mapping[str, float]) -> tuple[int, ...] | None:
    """The same plan, improved again and again by the single change within the limits that lowers the loss most."""
    found, rows = np.array(picks, dtype=np.intp), np.arange(len(picks))
    room = {q: limit - float(table.costs[q][rows, found].sum()) for q, limit in limits.items()}
    if any(left < 0 for left in room.values()):
        return None
    while True:
        gain = table.losses[rows, found][:, None] - table.losses
        for q, left in room.items():
            gain = np.where(table.costs[q] - table.costs[q][rows, found][:, None] <= left, gain, 0.0)
        group, choice = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[group, choice] <= 0:
            return tuple(int(i) for i in found)
        for q in room:
            room[q] -= float(table.costs[q][group, choice] - table.costs[q][group, found[group]])
        found[group] = choice


def _keeps(groups: Sequence[Choices], picks: Sequence[int], limits: Mapping[str, float]) -> bool:
    sums = {q: sum(float(g.costs[q][p]) for g, p in zip(groups, picks, strict=True)) for q in limits}
    return all(sums[q] <= limit * (1 + 1e-12) + 1e-9 for q, limit in limits.items())


def _part(group: Choices, kept: NDArray[np.intp]) -> Choices:
    return Choices(group.losses[kept], {q: v[kept] for q, v in group.costs.items()})


def _undominated(group: Choices, quantities: tuple[str, ...]) -> NDArray[np.intp]:
    """Candidates that no other beats in loss and every limited cost (of equal ones the first)."""
    table = np.stack([group.losses, *(group.costs[q] for q in quantities)], axis=1)
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    for i in order:
        if not kept or not (table[kept] <= table[i]).all(axis=1).any():
            kept.append(int(i))
    return np.array(kept, dtype=np.intp)


def _solve(
    groups: Sequence[Choices], kept: Sequence[NDArray[np.intp]], limits: Mapping[str, float], gap: float
) -> tuple[int, ...] | None:
    losses = np.concatenate([g.losses[k] for g, k in zip(groups, kept, strict=True)])
    owner = np.concatenate([np.full(len(k), n) for n, k in enumerate(kept)])
    one_each = csr_array((np.ones(len(losses)), (owner, np.arange(len(losses)))), shape=(len(groups), len(losses)))
    rows = {q: np.concatenate([g.costs[q][k] for g, k in zip(groups, kept, strict=True)]) for q in limits}
    scale = max(float(np.abs(losses).max()), 1e-300)
    # The solver keeps a row up to 1e-6 of its scale; a limit is kept exactly. Where it was not, ask for less.
    for margin in (0.0, 2e-6, 1e-5, 1e-4):
        constraints = [LinearConstraint(one_each, 1, 1)]
        for q, limit in limits.items():
            unit = max(abs(limit), 1e-12)
            constraints.append(LinearConstraint(csr_array(rows[q][None] / unit), -np.inf, limit / unit - margin))
        with _silent():
            result = milp(
                losses / scale,
                constraints=constraints,
                integrality=np.ones(len(losses)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": gap},
            )
        if result.x is None:
            return None
        picks = tuple(int(k[np.argmax(result.x[owner == n])]) for n, k in enumerate(kept))
        if _keeps(groups, picks, limits):
            return picks
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the standard output what HiGHS prints there now and then, whatever its options say."""
    try:
        kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard output
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    _flush()
    os.dup2(null, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def _flush() -> None:
    """Empty the C library's buffers, which Python does not see."""
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)
