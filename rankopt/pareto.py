"""Points that are all to be minimized: `front`, `ranked`, `hypervolume`, `gains`, `knee`. NumPy arrays in and out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the non-dominated rows of `points` (n, m), sorted by the first column; of equal rows only the first.

    Rows that hold NaN are never on the front.
    """
    x = np.asarray(points, dtype=float)
    if x.size == 0:
        return np.zeros(0, dtype=np.intp)
    order = np.lexsort(x.T[::-1])  # a row can only be dominated by one before it
    order = order[~np.isnan(x[order]).any(axis=1)]
    if x.shape[1] == 2:
        lowest = np.minimum.accumulate(np.append(np.inf, x[order, 1]))
        first = np.arange(len(order)) == 0  # also where its second value is infinite
        return np.asarray(order[(x[order, 1] < lowest[:-1]) | first], dtype=np.intp)
    kept: list[int] = []
    for i in order:
        if not kept or not (x[kept] <= x[i]).all(axis=1).any():
            kept.append(int(i))
    return np.array(kept, dtype=np.intp)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that `points` (n, m) dominate below `reference` (m,)."""
    x, ref = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    if x.size == 0:
        return 0.0
    x = x[(x < ref).all(axis=1)]
    x = x[front(x)]
    if len(x) == 0:
        return 0.0
    if x.shape[1] == 1:
        return float(ref[0] - x[:, 0].min())
    if x.shape[1] == 2:
        steps = np.append(x[1:, 0], ref[0]) - x[:, 0]
        return float((steps * (ref[1] - x[:, 1])).sum())
    # slice along the first objective: each slab is as wide as the step to the next point
    edges = np.append(x[1:, 0], ref[0]) - x[:, 0]
    return float(sum(w * hypervolume(x[: i + 1, 1:], ref[1:]) for i, w in enumerate(edges) if w > 0))


def gains(losses: ArrayLike, costs: ArrayLike, known: ArrayLike, reference: tuple[float, float]) -> NDArray[np.float64]:
    """By how much the area below `reference` that known points dominate would grow with each of the points.

    Args:
        losses, costs: (n,) of the points, both to be minimized.
        known: (k, 2) losses and costs of what was measured.
        reference: the worst loss and cost that count.
    """
    x, y = np.asarray(losses, float), np.asarray(costs, float)
    edge = np.asarray(known, float).reshape(-1, 2)
    edge = edge[(edge < reference).all(axis=1)]
    edge = edge[front(edge)] if len(edge) else edge  # losses rise, costs fall
    lows = np.append(edge[:, 0], reference[0])  # from this loss on …
    heights = np.append(reference[1], edge[:, 1])  # … up to the next, everything above this cost is dominated
    starts = np.append(-np.inf, lows[:-1])
    # between two losses of the front a point adds the strip between its own cost and the front's
    left = np.maximum(starts[None, :], x[:, None])
    width = np.maximum(lows[None, :] - left, 0.0)
    return np.asarray((width * np.maximum(heights[None, :] - y[:, None], 0.0)).sum(axis=1))


def ranked(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of all rows of `points` (n, m) without NaN, the best first.

    Front after front (non-dominated sorting, Deb et al., 2002); within a front the row that adds least to its
    hypervolume is put last, again and again (Emmerich et al., "An EMO algorithm using the hypervolume measure", 2005).
    The reference lies a tenth of the span beyond the worst value of each column.
    """
    x = np.asarray(points, dtype=float)
    left = [i for i in range(len(x)) if not np.isnan(x[i]).any()]
    if not left:
        return np.zeros(0, dtype=np.intp)
    low, high = x[left].min(axis=0), x[left].max(axis=0)
    scaled = (x - low) / np.where(high > low, high - low, 1.0)
    reference = np.full(x.shape[1], 1.1)
    order: list[int] = []
    while left:
        best = [left[i] for i in front(x[left])]
        left = [i for i in left if i not in best]
        last: list[int] = []
        while best:
            whole = hypervolume(scaled[best], reference)
            adds = [whole - hypervolume(scaled[[j for j in best if j != i]], reference) for i in best]
            last.insert(0, best.pop(int(np.argmin(adds))))
        order += last
    return np.array(order, dtype=np.intp)


def knee(points: ArrayLike) -> int:
    """Index of the front point farthest below the line between the front's ends (after scaling to the unit box)."""
    x = np.asarray(points, dtype=float)
    indices = front(x)
    if len(indices) == 0:
        raise ValueError("knee needs at least one point without NaN")
    y = x[indices]
    span = np.ptp(y, axis=0)
    y = (y - y.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(indices[np.argmin(y.sum(axis=1))])
