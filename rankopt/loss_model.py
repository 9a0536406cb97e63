"""`LossModel`: predicted losses of candidates, corrected by the plans that were measured.

The prediction knows every layer alone. What it gets wrong is much the same from plan to plan: a layer that matters more
than it seems, a method that the refit helps more than another, losses that add up to less or more than their sum. So

    log loss(plan) ≈ offset + power · log Σ over layers of exp(layer + method) · predicted ^ exponent

is fitted to all measured plans, with every correction pulled towards none (a Gaussian prior). Around the fit the
posterior is taken as Gaussian (Laplace's approximation), so that corrections can be drawn as likely as they are:
solving for the best plan under a draw is Thompson sampling (Thompson, "On the likelihood that one unknown probability
exceeds another", 1933).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankopt.candidates import Group
from rankopt.picks import Picks
from rankopt.plan import Plan

Array = NDArray[np.float64]

# How far corrections usually are from none: standard deviations, in natural logarithms but for the powers.
_OFFSET, _POWER, _EXPONENT, _METHOD, _LAYER = 1.0, 0.3, 0.2, 0.5, 0.5
_NOISE = 0.05  # of the logarithm of a measured loss, at least: what the model has no words for
_STEPS = 30
_EVERY = 50  # a new fit comes after a fiftieth more plans
_GLOBAL = 3  # offset, power, exponent
_REMEMBERED = 400  # plans that a fit looks at, the newest


@dataclass(frozen=True)
class Corrections:
    """One set of corrections: what the model is at, or a draw.

    Attributes:
        offset, power, exponent: of the formula above.
        methods: method → logarithmic factor.
        layers: (groups,) logarithmic factors.
    """

    offset: float
    power: float
    exponent: float
    methods: dict[str, float]
    layers: Array


class LossModel:
    """See above.

    Args:
        groups: the candidates with their predicted losses.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.methods = sorted({c.method for g in groups for c in g.choices if c.method != "dense"})
        positive = np.concatenate([g.losses[g.losses > 0] for g in groups] or [np.ones(1)])
        # Below this a loss is nothing: its logarithm would say more than the prediction knows.
        self._least = 1e-6 * float(positive.max()) if len(positive) else 1e-12
        self._middle = float(np.median(np.log(np.maximum(positive, self._least)))) if len(positive) else 0.0
        self._picks = Picks(groups)
        # (groups, most choices): logarithms of predicted losses less their middle, and numbers of methods
        self._sizes = [len(g.losses) for g in self.groups]
        shape = (len(self.groups), max(self._sizes, default=0))
        self._losses, self._methods = np.zeros(shape), np.full(shape, len(self.methods), dtype=np.intp)
        number = {name: n for n, name in enumerate(self.methods)}
        for n, group in enumerate(self.groups):
            self._losses[n, : len(group.losses)] = np.maximum(group.losses, 0.0)
            own = [number.get(c.method, len(number)) for c in group.choices]
            self._methods[n, : len(own)] = own
        self._logs = np.log(np.maximum(self._losses, self._least)) - self._middle
        size = _GLOBAL + len(self.methods) + len(self.groups)
        self._prior = np.zeros(size)
        self._prior[1] = self._prior[2] = 1.0
        deviations = [_OFFSET, _POWER, _EXPONENT, *[_METHOD] * len(self.methods), *[_LAYER] * len(self.groups)]
        self._weight = 1 / np.square(deviations)
        self._at = self._prior.copy()
        self._half: Array | None = None  # of the posterior's covariance: draws are at + half · standard normal
        self.noise = _NOISE
        self._fitted = 0  # how many plans the last fit was given

    def fit(self, plans: Sequence[Plan], losses: Sequence[float]) -> None:
        """Fit to measured losses (in the unit of the prediction); plans without a loss above 0 say nothing.

        With many plans not every one is worth a new fit: then only those up to the last whole step count.
        """
        count = len(plans) - len(plans) % max(1, len(plans) // _EVERY)
        if count == self._fitted:
            return
        self._fitted = count
        plans, losses = plans[:count], losses[:count]
        pairs: list[tuple[Plan, float]] = []
        for plan, loss in zip(reversed(plans), reversed(losses), strict=True):
            if len(pairs) < _REMEMBERED and loss > 0 and any(c.method != "dense" for c in plan.layers.values()):
                pairs.insert(0, (plan, loss))
        picked = [self._picks(plan) for plan, _ in pairs]
        rows = [(row, v) for row, (_, v) in zip(picked, pairs, strict=True) if row is not None]
        if not rows:
            return
        logs, methods = self._tables(np.array([row for row, _ in rows]))
        wanted = np.log([v for _, v in rows])
        at, noise = self._prior, _NOISE  # not from the last fit: a study that is resumed has to come to the same
        for _ in range(3):  # the noise that is left decides how far the prior is left, and the other way round
            at = self._solve(at, logs, methods, wanted, noise)
            left = wanted - self._values(at, logs, methods)[0]
            noise = max(_NOISE, float(np.sqrt(np.mean(left**2))))
        self._at, self.noise = at, noise
        slopes = self._values(at, logs, methods)[1]
        precision = slopes.T @ slopes / noise**2 + np.diag(self._weight)
        self._half = np.linalg.inv(np.linalg.cholesky(precision)).T

    def corrections(self, generator: np.random.Generator | None = None) -> Corrections:
        """The fitted corrections, or a draw of those that the measurements leave open."""
        at = self._at
        if generator is not None:
            half = self._half if self._half is not None else np.diag(1 / np.sqrt(self._weight))
            at = at + half @ generator.standard_normal(len(at))
        return self._read(at)

    def losses(self, corrections: Corrections) -> list[Array]:
        """For every group the corrected loss of each choice; they are to be summed."""
        factors = np.array([*(corrections.methods.get(name, 0.0) for name in self.methods), 0.0])
        factor = np.exp(corrections.exponent * self._logs + corrections.layers[:, None] + factors[self._methods])
        # what is nothing to the prediction stays near nothing, and cheaper is not better for it
        found = np.where(self._losses > self._least, factor, self._losses / self._least * factor)
        return [row[:size] for row, size in zip(found, self._sizes, strict=True)]

    def predicted(self, summed: float | Array, corrections: Corrections | None = None) -> Array:
        """The loss of plans whose corrected losses sum to this."""
        at = corrections or self._read(self._at)
        total = np.maximum(np.asarray(summed, float), 1e-300)
        return np.asarray(np.exp(at.offset + self._middle + at.power * np.log(total)))

    def loss(self, plan: Plan) -> float:
        """The fitted loss of a plan; 0 where all is dense, NaN for choices that are no candidates."""
        row = self._picks(plan)
        if row is None:
            return float("nan")
        if not plan.changed():
            return 0.0
        by_group = self.losses(self.corrections())
        return float(self.predicted(sum(float(v[i]) for v, i in zip(by_group, row, strict=True))))

    def _tables(self, picks: NDArray[np.intp]) -> tuple[Array, NDArray[np.intp]]:
        """(plans, groups): logarithms of predicted losses less their middle (−inf for none), and numbers of methods."""
        at = np.arange(len(self.groups))
        return np.where(self._losses > 0, self._logs, -np.inf)[at, picks], self._methods[at, picks]

    def _values(self, at: Array, logs: Array, methods: NDArray[np.intp], slopes: bool = True) -> tuple[Array, Array]:
        """Logarithms of the modelled losses of these plans, and (if asked) their slopes in the corrections."""
        factors = np.append(at[_GLOBAL : _GLOBAL + len(self.methods)], 0.0)[methods]
        inside = np.where(np.isfinite(logs), at[2] * np.where(np.isfinite(logs), logs, 0.0), -np.inf)
        inside = inside + factors + at[_GLOBAL + len(self.methods) :]
        top = inside.max(axis=1, keepdims=True)
        weights = np.exp(inside - top)
        total = weights.sum(axis=1, keepdims=True)
        shares, summed = weights / total, (top + np.log(total))[:, 0]
        values = at[0] + self._middle + at[1] * summed
        if not slopes:
            return values, np.zeros((0, 0))
        found = np.empty((len(logs), len(at)))
        found[:, 0], found[:, 1] = 1.0, summed
        found[:, 2] = at[1] * (shares * np.where(np.isfinite(logs), logs, 0.0)).sum(axis=1)
        for n in range(len(self.methods)):
            found[:, _GLOBAL + n] = at[1] * np.where(methods == n, shares, 0.0).sum(axis=1)
        found[:, _GLOBAL + len(self.methods) :] = at[1] * shares
        return values, found

    def _solve(self, at: Array, logs: Array, methods: NDArray[np.intp], wanted: Array, noise: float) -> Array:
        """Damped Gauss-Newton from here to the most likely corrections."""

        def cost(point: Array) -> float:
            left = wanted - self._values(point, logs, methods, slopes=False)[0]
            return float(left @ left / noise**2 + self._weight @ (point - self._prior) ** 2)

        damping, now = 1e-3, cost(at)
        for _ in range(_STEPS):
            values, slopes = self._values(at, logs, methods)
            precision = slopes.T @ slopes / noise**2 + np.diag(self._weight)
            pull = slopes.T @ (wanted - values) / noise**2 - self._weight * (at - self._prior)
            step = np.linalg.solve(precision + damping * np.diag(np.diag(precision)), pull)
            then = cost(at + step)
            if then <= now:
                settled = now - then < 1e-4 * max(now, 1.0)
                at, now, damping = at + step, then, damping / 4
                if settled:
                    break
            else:
                damping *= 8
                if damping > 1e6:
                    break
        return at

    def _read(self, at: Array) -> Corrections:
        middle = _GLOBAL + len(self.methods)
        methods = {name: float(v) for name, v in zip(self.methods, at[_GLOBAL:middle], strict=True)}
        return Corrections(float(at[0]), float(at[1]), float(at[2]), methods, at[middle:].copy())
