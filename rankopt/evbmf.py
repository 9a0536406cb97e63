"""`evbmf_rank`: how many singular values of a matrix stand out of noise of unknown strength.

The global analytic solution of empirical variational Bayesian matrix factorization (Nakajima, Sugiyama, Babacan and
Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix factorization", 2013), with the noise
variance that minimizes the free energy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.factors import Factors

_TAU = (
    2.5129  # the zero of Φ below that bounds the noise variance (section 3 of the paper, the value for large matrices)
)

_ESTIMATED = ("rank", "rank_out", "rank_in")


def evbmf_rank(matrix: ArrayLike) -> int:
    """The rank that is estimated, 0 to min(matrix.shape).

    Args:
        matrix: (rows, columns).
    """
    y = np.asarray(matrix, float)
    if y.shape[0] > y.shape[1]:
        y = y.T
    rows, columns = y.shape
    if rows == 0 or not np.any(y):
        return 0
    values = np.linalg.svd(y, compute_uv=False)
    ratio = rows / columns
    tau = _TAU * np.sqrt(ratio)
    bound = np.sqrt(1 + tau) * np.sqrt(1 + ratio / tau)  # of γ / √(columns · variance)
    energy = float(values @ values)
    least = min(max(int(np.ceil(rows / (1 + ratio))) - 1, 1), rows) - 1
    upper = energy / (rows * columns)
    rest = values[least + 1 :]
    lower = max(
        float(values[least + 1] ** 2 / (columns * bound**2)) if least + 1 < rows else 0.0,
        float(np.mean(rest**2) / columns) if len(rest) else 0.0,
        1e-12 * upper,
    )
    if lower >= upper:
        variance = upper
    else:
        variance = float(
            minimize_scalar(
                lambda v: _free_energy(v, values, rows, columns, bound, energy), bounds=(lower, upper), method="bounded"
            ).x
        )
    return int(np.sum(values > np.sqrt(columns * variance) * bound))


def estimated_share(group: Group, name: str, factors: Factors) -> float:
    """The share of a group's MACs (parameters where it takes none) that a method keeps at the ranks of EVBMF.

    Every rank that belongs to one unfolding of the weight (output channels, input channels, the matrix itself) is
    estimated from that; others are left at their bounds.
    """
    way, total = method(name), 0.0
    quantity = "macs" if any(layer.macs for layer in group.layers) else "params"
    for layer in group.layers:
        weight = factors.weight(layer).double()
        ranks = {}
        for rank, bound in way.rank_bounds(layer).items():
            unfolded = weight.transpose(1, 2) if rank == "rank_in" else weight
            estimates = [evbmf_rank(w.flatten(1).numpy()) for w in unfolded] if rank in _ESTIMATED else [bound]
            ranks[rank] = min(max(max(estimates), 1), bound)
        total += float(getattr(way, quantity)(layer, ranks))
    return total / max(sum(getattr(layer, quantity) for layer in group.layers), 1)


def _free_energy(variance: float, values: np.ndarray, rows: int, columns: int, bound: float, energy: float) -> float:
    """Twice the free energy up to constants, as a function of the noise variance (equation 17 of the paper)."""
    ratio = rows / columns
    x = values**2 / (columns * variance)
    signal, noise = x[x > bound**2], x[x <= bound**2]
    t = _tau(signal, ratio)
    found = float(np.sum(noise - np.log(np.maximum(noise, 1e-300)))) + float(np.sum(signal - t))
    found += float(np.sum(np.log((t + 1) / signal))) + ratio * float(np.sum(np.log(t / ratio + 1)))
    return found


def _tau(x: np.ndarray, ratio: float) -> np.ndarray:
    inside = np.maximum((x - (1 + ratio)) ** 2 - 4 * ratio, 0.0)
    return np.asarray((x - (1 + ratio) + np.sqrt(inside)) / 2)
