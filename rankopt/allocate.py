"""`allocate`: the plan with the least predicted loss under every limit, as a multiple-choice knapsack.

One binary variable a candidate; one candidate a group of layers; one row a limit. Solved by HiGHS through SciPy.
"""

from __future__ import annotations

import ctypes
import itertools
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
    steps: list[tuple[float, int, int, float, float]] = []  # slope, group, candidate, more cost, less loss
    start = np.zeros(len(groups), dtype=np.intp)
    cost = loss = 0.0
    for n, group in enumerate(groups):
        hull = _hull(group.costs[quantity], group.losses)
        start[n] = hull[0]
        cost, loss = cost + float(group.costs[quantity][hull[0]]), loss + float(group.losses[hull[0]])
        for a, b in itertools.pairwise(hull):
            more = float(group.costs[quantity][b] - group.costs[quantity][a])
            less = float(group.losses[a] - group.losses[b])
            steps.append((less / more, n, int(b), more, less))
    steps.sort(key=lambda step: -step[0])
    costs = cost + np.cumsum([0.0, *(s[3] for s in steps)])
    losses = loss - np.cumsum([0.0, *(s[4] for s in steps)])
    moved = np.array([-1, *(s[1] for s in steps)], dtype=np.intp)
    return Frontier(costs, losses, moved, np.array([-1, *(s[2] for s in steps)], dtype=np.intp), start)


def _hull(costs: Array, losses: Array) -> list[int]:
    """Candidates on the lower left convex hull, from the cheapest to the one of least loss."""
    kept: list[int] = []
    for i in np.lexsort((losses, costs)):
        if kept and losses[i] >= losses[kept[-1]]:
            continue
        if kept and costs[i] <= costs[kept[-1]]:
            continue
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (losses[a] - losses[b]) * (costs[i] - costs[b]) > (losses[b] - losses[i]) * (costs[b] - costs[a]):
                break
            kept.pop()
        kept.append(int(i))
    return kept


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
            picks = _filled(groups, line.picks(at - back), limits)
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


def _filled(groups: Sequence[Choices], picks: tuple[int, ...], limits: Mapping[str, float]) -> tuple[int, ...] | None:
    """The same plan with each group in turn at its best candidate that the limits still leave room for."""
    found = list(picks)
    room = {
        q: limit - sum(float(g.costs[q][p]) for g, p in zip(groups, found, strict=True)) for q, limit in limits.items()
    }
    if any(left < 0 for left in room.values()):
        return None
    for n, group in enumerate(groups):
        fits = np.all([group.costs[q] - group.costs[q][found[n]] <= left for q, left in room.items()], axis=0)
        better = np.flatnonzero(fits & (group.losses < group.losses[found[n]]))
        if len(better):
            choice = int(better[np.argmin(group.losses[better])])
            room = {q: left - float(group.costs[q][choice] - group.costs[q][found[n]]) for q, left in room.items()}
            found[n] = choice
    return tuple(found)


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
