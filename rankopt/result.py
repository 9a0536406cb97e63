"""`Result`: what a study found, as plain values; needs neither torch nor Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import InfeasibleError, InputError
from rankopt.limits import Limit, measured_key, parse_limit
from rankopt.pareto import front, knee
from rankopt.plan import Plan

if TYPE_CHECKING:
    from torch import nn

MAXIMIZED = ("accuracy",)
_UNITS = {"latency": " ms", "latency_p95": " ms", "memory": " MiB"}


@dataclass(frozen=True)
class Entry:
    """One measured plan.

    Attributes:
        trial: its number in the study (-1: not part of one).
        plan: the decisions.
        measurements: quantity → value, None where it was not measured.
        feasible: whether it keeps all limits.
        notes: what is needed to build the same model again.
    """

    trial: int
    plan: Plan
    measurements: Mapping[str, float | None]
    feasible: bool
    notes: Mapping[str, float] = field(default_factory=dict)
    _owner: Any = field(default=None, repr=False, compare=False)

    def build(self) -> nn.Module:
        """The compressed model, refitted as in the trial."""
        return self._search().build(self.plan, bn=bool(self.notes.get("bn", 0)))

    def save(
        self, directory: str | Path, force: bool = False, exports: Sequence[str] = (), memory: bool = False
    ) -> dict[str, Any]:
        """Write an artifact that `rankopt.load` reads; returns what the reloaded model measures.

        `exports` names further formats, such as ``onnx`` and ``pt2``. `memory`: peak memory of inference is measured
        too (on Linux), dense and compressed, in some processes of their own.
        """
        return self._search().save(self, directory, force=force, exports=exports, memory=memory)

    def _search(self) -> Any:
        if self._owner is None:
            raise InputError("this entry was read from storage alone; open the study with its model to build it")
        return self._owner


@dataclass(frozen=True)
class Progress:
    """What a running search tells: `best` within the limits so far, `text` while there is no trial yet, and `entry`:
    what the last trial measured (None where it failed)."""

    done: int
    total: int
    seconds: float
    best: Mapping[str, float | None] | None = None
    hypervolume: float | None = None
    text: str = ""
    entry: Entry | None = None


@dataclass(frozen=True)
class Result:
    """All entries of a study.

    Attributes:
        entries: every measured plan in the order of trials, a plan that came twice once.
        objectives: their names; accuracy is maximized, all others minimized.
        limits: those that `feasible` refers to.
        dense: what the dense model measures.
        failed: trial → why it has no measurements.
        notes: how well latencies are predicted, and which measurements were noisy.
        conditions: target → what its times depend on besides the model.
    """

    entries: Sequence[Entry]
    objectives: tuple[str, ...]
    limits: tuple[Limit, ...]
    dense: Mapping[str, float]
    failed: Mapping[int, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    conditions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def front(self) -> list[Entry]:
        """The non-dominated entries in the objectives, from the most faithful to the cheapest; feasible ones first
        where there are any."""
        entries = [e for e in self.entries if e.trial >= 0]  # without the dense model
        pool = [e for e in entries if e.feasible] or entries
        pool = [e for e in pool if all(e.measurements.get(measured_key(q)) is not None for q in self.objectives)]
        indices: Sequence[Any] = list(front([minimized(e.measurements, self.objectives) for e in pool])) if pool else []
        return [pool[i] for i in indices]

    def best(self, limits: Sequence[Limit | str] | None = None) -> Entry:
        """The best entry within the limits (those of the study when None).

        With a limit on quality (accuracy, kl) the cheapest entry that keeps it, else the one of the best quality. One
        that is slower than the dense model on a target only where all within the limits are.

        Raises:
            InfeasibleError: none keeps them; says what is reachable among the measured plans.
        """
        return self.top(1, limits)[0]

    def top(self, n: int, limits: Sequence[Limit | str] | None = None) -> list[Entry]:
        """The `n` best entries within the limits, best first, in the order that `best` takes the first of; fewer where
        there are not so many. Raises as `best` does."""
        wanted = (
            self.limits if limits is None else tuple(parse_limit(li) if isinstance(li, str) else li for li in limits)
        )
        known = [e for e in self.entries if e.measurements.get("kl") is not None]
        good = [e for e in known if all(li.violation(_values(e), self.dense) <= 0 for li in wanted)]
        if not good:
            raise InfeasibleError(self._nearest(known, wanted))
        complete = [e for e in good if all(e.measurements.get(measured_key(o)) is not None for o in self.objectives)]
        good = complete or good
        order = self._order(wanted)
        return sorted(good, key=lambda e: (_slower(e), *order(e)))[:n]

    def knee(self) -> Entry:
        """The entry of the front farthest below the line between the front's ends: where more compression begins to
        cost much more quality. Raises `InfeasibleError` when nothing keeps the limits."""
        found = [e for e in self.front if e.feasible]
        if not found:
            return self.best()  # raises, and says what is reachable
        return found[knee([minimized(e.measurements, self.objectives) for e in found])]

    def to_pandas(self) -> Any:
        """The measured plans as a `pandas.DataFrame`: a row each, a column a quantity, and ``layer.NAME`` a layer.

        Raises `InputError` where pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError("to_pandas: needs pandas; install it with: pip install 'rankopt[report]'") from None
        on_front = {e.trial for e in self.front}
        rows = [
            {"trial": e.trial, "within_limits": e.feasible, "front": e.trial in on_front, **e.measurements}
            | {f"layer.{name}": str(choice) for name, choice in e.plan.layers.items()}
            for e in self.entries
            if e.trial >= 0
        ]
        return pd.DataFrame.from_records(rows)

    def _order(self, limits: Sequence[Limit]) -> Callable[[Entry], tuple[float, ...]]:
        costs = [q for q in self.objectives if q not in ("accuracy", "kl")] or ["macs"]
        quality = [q for q in self.objectives if q in ("accuracy", "kl")] or ["kl"]
        if any(li.quantity in ("accuracy", "kl") for li in limits):
            return lambda e: minimized(e.measurements, [*costs, *quality])
        return lambda e: minimized(e.measurements, [*quality, "kl", *costs])

    def _nearest(self, known: Sequence[Entry], limits: Sequence[Limit]) -> str:
        if not known:
            reasons = sorted(set(self.failed.values()))
            return f"no trial was measured to the end{': ' + reasons[0] if reasons else ''}"
        texts = []
        for li in limits:
            values = [v for e in known if (v := e.measurements.get(li.key)) is not None]
            extreme = (max(values) if li.op == ">=" else min(values)) if values else None
            texts.append(f"{li} ({self._reached(li, extreme)})")
        plans = sum(e.trial >= 0 for e in known)
        return (
            f"none of {plans} measured plans keeps all limits: {', '.join(texts)}{self._closest(known, limits)};"
            " allow more, or run more trials"
        )

    def _closest(self, known: Sequence[Entry], limits: Sequence[Limit]) -> str:
        """The plan that breaks its worst limit by the least."""
        beyond = [(max(li.violation(_values(e), self.dense) for li in limits), e) for e in known if e.trial >= 0]
        beyond = [(by, e) for by, e in beyond if math.isfinite(by)]
        if not beyond:
            return ""
        by, entry = min(beyond, key=lambda pair: (pair[0], pair[1].trial))
        return f"; the closest is trial {entry.trial}, {by:.1%} beyond the worst of them"

    def _reached(self, limit: Limit, extreme: float | None) -> str:
        if extreme is None:
            return "never measured"
        if limit.relative == "dense":
            return f"reached: {extreme / self.dense[limit.key]:.1%} of dense"
        if limit.relative == "change":
            return f"reached: {extreme - self.dense[limit.key]:+.4g}"
        return f"reached: {extreme:.6g}{_UNITS.get(limit.quantity, '')}"


def told(key: str, keys: Collection[str]) -> bool:
    """Whether people are shown a measurement: not what is there for programs, nor the first target's values twice."""
    name, at, _ = key.partition("@")
    hidden = name.startswith("latency") and ("predicted" in name or "spread" in name)
    twice = at and name in keys and key == next(k for k in keys if k.startswith(f"{name}@"))
    return not (hidden or twice)


def minimized(values: Mapping[str, float | None], quantities: Sequence[str]) -> tuple[float, ...]:
    """The quantities as numbers to be minimized; one that is not known is infinite."""
    out = []
    for q in quantities:
        value = values.get(measured_key(q))
        out.append(float("inf") if value is None else -value if q in MAXIMIZED else value)
    return tuple(out)


def _slower(entry: Entry) -> bool:
    """Whether it was measured to be slower than the dense model on some target."""
    return any(k.startswith("latency_kept") and v is not None and v > 1 for k, v in entry.measurements.items())


def _values(entry: Entry) -> dict[str, float]:
    return {k: v for k, v in entry.measurements.items() if v is not None}
