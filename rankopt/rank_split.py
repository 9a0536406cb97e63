"""`split`: the ranks that lose least of a layer's energy at a given cost, read off the spectra of one factorization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rankopt.decompositions.decomposition import Decomposition, Factors
from rankopt.layer_spec import LayerSpec

_GRID = 40_000  # combinations that are costed at once


def rank_levels(bound: int, multiple: int, limit: int | None = None) -> NDArray[np.int64]:
    """The ranks that may be used: multiples of `multiple` up to the bound (the bound itself where it is smaller).

    With `limit`, at most so many of them, evenly spread in the logarithm.
    """
    levels = np.arange(multiple, bound + 1, multiple, dtype=np.int64) if bound >= multiple else np.array([bound])
    if limit is None or len(levels) <= limit:
        return levels
    picked = np.unique(np.geomspace(1, len(levels), limit).round().astype(np.int64)) - 1
    return levels[picked]


def split(
    way: Decomposition,
    layer: LayerSpec,
    factors: Factors | Sequence[Factors],
    keeps: Sequence[float],
    multiple: int = 1,
    quantity: str | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[float, dict[str, int]]:
    """For every share of the dense layer's cost, the ranks that lose the least energy among those that cost no more.

    Args:
        way, layer: the method and the layer.
        factors: what `way.factorize` returned; several for layers of one shape that must share their ranks.
        keeps: shares of the layer's cost in (0, 1].
        multiple: ranks are multiples of this.
        quantity: the cost, macs or params; by default what the method saves.
        counts: values of what the method counts (`Decomposition.counted`), which no spectrum orders; by default the
            largest.

    Returns:
        keep → ranks; a share that even the smallest ranks exceed is left out.
    """
    several: list[Factors] = [factors] if isinstance(factors, Mapping) else list(factors)
    bounds = way.rank_bounds(layer)
    names = list(bounds)
    quantity = way.saves[0] if quantity is None else quantity
    fixed = {n: np.array([bounds[n]]) for n in way.counted(layer)}
    fixed |= {n: np.array([count]) for n, count in (counts or {}).items()}
    per_rank = max(2, int(_GRID ** (1 / max(len(names) - len(fixed), 1))))
    axes = [fixed[n] if n in fixed else rank_levels(bounds[n], multiple, per_rank) for n in names]
    found: dict[float, dict[str, int]] = {}
    grid = _cost(way, layer, several, quantity, axes)
    for keep in keeps:
        budget = keep * getattr(layer, quantity)
        best = _best(grid, budget)
        if best is None:
            continue
        while True:  # the grid may be coarse: look at the neighbours until none is better
            near = [fixed[n] if n in fixed else _around(best[n], bounds[n], multiple) for n in names]
            better = _best(_cost(way, layer, several, quantity, near), budget)
            if better is None or better == best:
                break
            best = better
        found[keep] = best
    return found


_Table = tuple[dict[str, NDArray[np.int64]], NDArray[np.float64], NDArray[np.float64]]


def _cost(
    way: Decomposition, layer: LayerSpec, factors: Sequence[Factors], quantity: str, axes: list[NDArray[np.int64]]
) -> _Table:
    mesh = (
        np.array(list(itertools.product(*axes)), dtype=np.int64)
        if math.prod(map(len, axes)) < 2000
        else (np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)))
    )
    ranks = {n: mesh[:, i] for i, n in enumerate(way.rank_bounds(layer))}
    lost = sum(np.asarray(way.lost(f, ranks), dtype=float) for f in factors)
    return ranks, np.asarray(getattr(way, quantity)(layer, ranks), dtype=float), np.asarray(lost, dtype=float)


def _best(table: _Table, budget: float) -> dict[str, int] | None:
    ranks, costs, lost = table
    fits = costs <= budget
    if not fits.any():
        return None
    # of equal losses (up to rounding) the cheapest
    order = np.lexsort((costs, np.where(fits, np.round(lost, 12), np.inf)))
    return {n: int(r[order[0]]) for n, r in ranks.items()}


def _around(rank: int, bound: int, multiple: int) -> NDArray[np.int64]:
    if bound < multiple:
        return np.array([bound])
    steps = np.array([-4, -2, -1, 0, 1, 2, 4]) * multiple + rank
    return np.unique(np.clip(steps, multiple, bound // multiple * multiple))


def every_count(way: Decomposition, layer: LayerSpec) -> list[dict[str, int]]:
    """Every combination of what the method counts on this layer, the largest first; one empty one without counts."""
    names, bounds = way.counted(layer), way.rank_bounds(layer)
    return [dict(zip(names, c, strict=True)) for c in itertools.product(*(range(bounds[n], 0, -1) for n in names))]


def full_ranks(bounds: Mapping[str, int], multiple: int = 1) -> dict[str, int]:
    """The largest ranks of that multiple."""
    return {n: int(rank_levels(b, multiple)[-1]) for n, b in bounds.items()}
