"""The correction of predicted latencies: a robust fit of relative errors, and its error on other plans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

Array = NDArray[np.float64]

_PULL = (1e-3, 1e-3, 1e-3)  # of the table's sum, the weights' size and the constant towards 1, 0 and 0
_PULL_METHOD = 0.05
_FEWEST = 4  # plans below which leaving one out says nothing
_EXACT = 100.0  # the weight of the dense model, whose share is 1 by definition, against one of a measured plan
_SCALE = 0.02  # relative errors above it count less and less: what the noise of a good measurement explains is below
_STEPS = 20  # of reweighting; the coefficients stand still after 5 to 15


@dataclass(frozen=True)
class PredictionError:
    """How far predicted latencies are from measured ones, on plans that the prediction was not fitted on.

    Attributes:
        median, p95: of the absolute relative error.
        plans: how many there were.
    """

    median: float
    p95: float
    plans: int

    def __str__(self) -> str:
        return f"median {self.median:.1%}, 95th percentile {self.p95:.1%}, over {self.plans} plans left out of the fit"


def fitted(rows: Array, kept: Array) -> Array:
    """Coefficients of the features; more time in the table and larger weights never make a plan faster.

    Plans are measured several at a time beside one run of the dense model. Now and then that run is off by a fifth, and
    with it all of them: squared errors would let such a batch bend the whole fit. The loss is therefore quadratic for
    small errors and linear for large ones, 2 (√(1 + (e/s)²) - 1), minimized by iteratively reweighted least squares
    (Holland and Welsch 1977, "Robust regression using iteratively reweighted least-squares").

    Args:
        rows: (plans, 3 + methods) sum of the shares of dense in the table, share of the weights, 1, and the first again
            for every method; the first row is the dense model.
        kept: (plans,) measured shares of the dense model's latency.
    """
    methods = rows.shape[1] - 3
    prior = np.array([1.0, 0.0, 0.0] + [0.0] * methods)
    pull = np.sqrt([*_PULL, *[_PULL_METHOD] * methods])
    lower = np.array([0.3, 0.0, -1.0] + [-0.25] * methods)
    relative, weights = rows / kept[:, None], np.ones(len(kept))
    found = prior
    for _ in range(_STEPS):
        weights[0] = _EXACT
        matrix = np.vstack([relative * weights[:, None], np.diag(pull)])
        before = found
        found = lsq_linear(matrix, np.concatenate([weights, pull * prior]), (lower, np.full(len(prior), np.inf))).x
        if np.allclose(found, before, atol=1e-4):
            break
        weights = (1 + ((relative @ found - 1) / _SCALE) ** 2) ** -0.25
    return np.asarray(found)


def left_out(rows: Array, kept: Array) -> PredictionError | None:
    """The error on each plan when the others are fitted; the first row is the dense model and always stays."""
    if len(rows) - 1 < _FEWEST:
        return None
    misses = []
    for out in range(1, len(rows)):
        rest = np.arange(len(rows)) != out
        misses.append(abs(float(fitted(rows[rest], kept[rest]) @ rows[out]) / kept[out] - 1))
    return PredictionError(float(np.median(misses)), float(np.quantile(misses, 0.95)), len(misses))
