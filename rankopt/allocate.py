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
    kept = [_undominated(g, tuple(limits)) for g in groups]
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
        sums = {q: sum(float(g.costs[q][p]) for g, p in zip(groups, picks, strict=True)) for q in limits}
        if all(sums[q] <= limit * (1 + 1e-12) + 1e-9 for q, limit in limits.items()):
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
