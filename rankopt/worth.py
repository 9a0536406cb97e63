"""What measurements are worth: to the sampler, to the front, and whether a plan is worth measuring on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rankopt.limits import Limit, measured_key
from rankopt.pareto import hypervolume
from rankopt.result import MAXIMIZED, Entry, Result, minimized

Array = NDArray[np.float64]
_DOUBT = 0.05  # how far a predicted latency may be off when it is asked whether a plan is worth measuring
_WORST_KL = 3.0  # nats


def told_values(values: Mapping[str, float | None], objectives: Sequence[str]) -> list[float | None]:
    """The objectives' values for the sampler; a latency that was not worth measuring as predicted."""
    keys = [measured_key(o) for o in objectives]
    return [values.get(key, values.get(_predicted(key))) for key in keys]


def signed(values: Sequence[float | None], objectives: Sequence[str]) -> list[float | None]:
    """The objectives' values, all to be minimized."""
    signs = [-1.0 if o in MAXIMIZED else 1.0 for o in objectives]
    return [None if v is None else sign * v for sign, v in zip(signs, values, strict=True)]


def excess_over(limits: Sequence[Limit], measured: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """How far beyond each limit; what was not measured is taken for kept by as much as it can be."""
    return {str(li): min(li.violation(measured, dense), 1e6) for li in limits}


def _predicted(key: str) -> str:
    return key.replace("_ms", "_predicted_ms") if key.startswith("latency") else key


def worth(
    known: Mapping[str, float],
    entries: Sequence[Entry],
    objectives: Sequence[str],
    limits: Sequence[Limit],
    dense: Mapping[str, float],
) -> bool:
    """Whether no measured plan is better in everything, even where the predicted latency is too high by `_DOUBT`.

    Everything is the objectives and what limits are on. Plans that break a limit which this one is known to keep are no
    rivals, and what can't be predicted (memory) has to be measured.
    """
    open_limits = [li for li in limits if li.key not in known]
    keys = list(dict.fromkeys([*map(measured_key, objectives), *(li.key for li in open_limits)]))
    hoped = dict(known)
    for key in keys:
        if key not in hoped and _predicted(key) in known:
            hoped[key] = known[_predicted(key)] * (1 - _DOUBT)
    if any(key not in hoped for key in keys):
        return True
    mine = np.array(minimized(hoped, keys))
    closed = [li for li in limits if li.key in known]
    for entry in entries:
        values = {k: v for k, v in entry.measurements.items() if v is not None}
        other = np.array(minimized(values, keys))
        if (other <= mine).all() and (other < mine).any() and all(li.violation(values, dense) <= 0 for li in closed):
            return False
    return True


def volume(result: Result) -> float:
    """Hypervolume of the front: kl from 3 nats down, costs as shares of dense from 1 down, accuracy from 0 up."""
    points = [minimized(e.measurements, result.objectives) for e in result.front]
    return _Scale(result).volume(np.array(points))


class _Scale:
    """What is taken for one, and from where on a front counts."""

    def __init__(self, result: Result) -> None:
        one = [1.0 if o in ("kl", *MAXIMIZED) else result.dense.get(measured_key(o), 1.0) for o in result.objectives]
        self._one = np.array(one)
        self._reference = [_WORST_KL if o == "kl" else 0.0 if o in MAXIMIZED else 1.0 for o in result.objectives]

    def volume(self, points: Array) -> float:
        return hypervolume(points / self._one, self._reference) if len(points) else 0.0


class Grown:
    """The front of a growing number of plans, and its hypervolume; a plan that is not on it costs a comparison."""

    def __init__(self, result: Result) -> None:
        self._objectives, self._scale = result.objectives, _Scale(result)
        self._front = np.zeros((0, len(result.objectives)))
        self.volume = 0.0

    def __len__(self) -> int:
        return len(self._front)

    def add(self, entry: Entry) -> None:
        """One more plan."""
        if entry.trial < 0 or any(entry.measurements.get(measured_key(o)) is None for o in self._objectives):
            return
        point = np.array(minimized(entry.measurements, self._objectives))
        if np.isnan(point).any() or (self._front <= point).all(axis=1).any():
            return
        self._front = np.vstack([self._front[~(point <= self._front).all(axis=1)], point])
        self.volume = max(self.volume, self._scale.volume(self._front))


class Gains:
    """The front as plan after plan is measured, and how many trials there were since it grew last.

    As long as no plan keeps the limits it is the front of all plans, and afterwards that of those that do.
    """

    def __init__(self, empty: Result) -> None:
        self._all, self._kept = Grown(empty), Grown(empty)
        self.without = 0

    @property
    def volume(self) -> float:
        """Its hypervolume."""
        return self._kept.volume if len(self._kept) else self._all.volume

    def add(self, entry: Entry | None) -> None:
        """The next trial, and what it measured if it did."""
        before = (self._kept.volume, 0.0 if self._kept.volume else self._all.volume)
        if entry is not None:
            self._all.add(entry)
            if entry.feasible:
                self._kept.add(entry)
        after = (self._kept.volume, 0.0 if self._kept.volume else self._all.volume)
        self.without = 0 if after > before else self.without + 1
