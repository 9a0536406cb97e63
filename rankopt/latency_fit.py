"""The correction of predicted latencies: regularized least squares on relative errors, and its error on other plans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

Array = NDArray[np.float64]

_PULL = (1e-3, 1e-3, 1e-3)  # of the table's sum, the weights' size and the constant towards 1, 0 and 0
_PULL_METHOD = 0.05
_FEWEST = 4  # plans below which leaving one out says nothing


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

    Args:
        rows: (plans, 3 + methods) sum of the shares of dense in the table, share of the weights, 1, and the first again
            for every method.
        kept: (plans,) measured shares of the dense model's latency.
    """
    methods = rows.shape[1] - 3
    prior = np.array([1.0, 0.0, 0.0] + [0.0] * methods)
    pull = np.sqrt([*_PULL, *[_PULL_METHOD] * methods])
    matrix = np.vstack([rows / kept[:, None], np.diag(pull)])
    wanted = np.concatenate([np.ones(len(kept)), pull * prior])
    lower = np.array([0.3, 0.0, -1.0] + [-0.25] * methods)
    return np.asarray(lsq_linear(matrix, wanted, (lower, np.full(len(prior), np.inf))).x)


def left_out(rows: Array, kept: Array) -> PredictionError | None:
    """The error on each plan when the others are fitted; the first row is the dense model and always stays."""
    if len(rows) - 1 < _FEWEST:
        return None
    misses = []
    for out in range(1, len(rows)):
        rest = np.arange(len(rows)) != out
        misses.append(abs(float(fitted(rows[rest], kept[rest]) @ rows[out]) / kept[out] - 1))
    return PredictionError(float(np.median(misses)), float(np.quantile(misses, 0.95)), len(misses))
