"""`Devices`: everything that a search measures on its targets: latency on each, and peak memory on the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rankopt.candidates import Group
from rankopt.errors import InputError, LimitError
from rankopt.latency import EFFORT, WRONG, PlanLatency
from rankopt.layer_spec import LayerSpec
from rankopt.limits import Limit, measured_key
from rankopt.measurement import Measurement
from rankopt.plan import Plan
from rankopt.targets.target import Target
from rankopt.timing import Effort

MEMORY = "peak_memory_mib"
_BYTES = 4 / 2**20  # MiB of a weight
_NEAR = 0.10  # how near to a bound measured plans have to be to say how far predictions are off there
_NEIGHBOURS = 5
_CLOSE = 0.02  # a plan that keeps its limit by less is measured until it breaks it, or in so many sessions
_SESSIONS = 3
_STEP = 0.01


class Devices:
    """The targets of a search and what is known of them.

    Args:
        targets: where latency is measured; the first one's needs no label in limits and objectives.
        model, layers, args, kwargs: as for `PlanLatency`.
        memory: whether peak memory is measured, on the first target.
        cache: see `PlanLatency`.
        seed: of the plans that predictions are fitted on.
        effort: of a measurement of whole models.

    Attributes:
        dense: what the dense model measures.

    Raises:
        InputError: two targets have one label, or a target is not there.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        model: nn.Module,
        layers: Sequence[LayerSpec],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        memory: bool = False,
        cache: Path | bool | None = None,
        seed: int = 0,
        effort: Effort = EFFORT,
    ) -> None:
        labels = [t.called for t in targets]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"targets: two are called {label!r}; give one of them another label")
        self.latencies = [
            PlanLatency(t, model, layers, args, kwargs, cache=cache, seed=seed, effort=effort) for t in targets
        ]
        self.memory = memory
        self.dense: dict[str, float] = {}
        self._noisy: dict[str, tuple[int, Measurement]] = {}
        self._tails: set[str] = set()  # predicted quantities whose bound stands for one on the 95th percentile
        for latency in self.latencies:
            self.dense |= latency.values(latency.dense)
            self._say(f"dense on {latency.label}", latency.dense)
        if memory and self.latencies:
            self.dense |= {MEMORY: self.latencies[0].peak_memory(Plan({})).value, "memory_kept": 1.0}
        self.dense = self._aliased(self.dense)

    def __bool__(self) -> bool:
        return bool(self.latencies)

    @property
    def labels(self) -> list[str]:
        """What the targets are called."""
        return [latency.label for latency in self.latencies]

    @property
    def conditions(self) -> dict[str, dict[str, str]]:
        """Label → what its times depend on besides the model."""
        return {latency.label: latency.conditions for latency in self.latencies}

    def prepare(self, groups: Sequence[Group], progress: Callable[[str], None] = lambda text: None) -> None:
        """Make latencies of these candidates predictable on every target."""
        for latency in self.latencies:
            latency.prepare(groups, progress)

    def costs(self, group: Group) -> dict[str, NDArray[np.float64]]:
        """Quantity → what each choice of a group adds to it, as predicted."""
        return {f"latency_ms@{la.label}": la.costs(group) for la in self.latencies}

    @property
    def fixed(self) -> dict[str, float]:
        """Quantity → what is outside of all groups."""
        return {f"latency_ms@{la.label}": la.fixed for la in self.latencies}

    @property
    def totals(self) -> dict[str, float]:
        """Quantity → what the dense model takes."""
        return {f"latency_ms@{la.label}": la.dense.value for la in self.latencies}

    def bounds(self, limits: Sequence[Limit], params: float) -> dict[str, float]:
        """Limits on what is measured here as bounds on what can be summed: quantity → upper bound.

        A 95th percentile is taken to keep its dense proportion to the median (until `ratio` knows better), and memory
        to change by four bytes a weight; both are measured later.

        Args:
            limits: of the search; those on other quantities are passed over.
            params: of the dense model.
        """
        found: dict[str, float] = {}
        self._tails.clear()
        for limit in limits:
            if limit.quantity in ("latency", "latency_p95"):
                latency = self.named(limit.target, limit)
                bound = limit.bound(self.dense)
                if limit.quantity == "latency_p95":
                    bound *= latency.dense.value / latency.dense.p95
                key = f"latency_ms@{latency.label}"
            elif limit.quantity == "memory":
                key, bound = "params", params + (limit.bound(self.dense) - self.dense[MEMORY]) / _BYTES
            else:
                continue
            if bound < found.get(key, np.inf):
                found[key] = bound
                (self._tails.add if limit.quantity == "latency_p95" else self._tails.discard)(key)
        return found

    def named(self, label: str | None, limit: Limit | str = "") -> PlanLatency:
        """The target of this label, the first one without; raises `LimitError` that lists them."""
        if label is None and self.latencies:
            return self.latencies[0]
        for latency in self.latencies:
            if latency.label == label:
                return latency
        raise LimitError(f"limit {str(limit)!r}: no target is called {label!r}; there are {', '.join(self.labels)}")

    def predicted(self, plan: Plan) -> dict[str, float]:
        """What a plan is predicted to take on every target, where that is known: in ms, the 95th percentile too."""
        found: dict[str, float] = {}
        for la in self.latencies:
            if la.predictable(plan):
                time = la.predict(plan)
                found[f"latency_predicted_ms@{la.label}"] = time
                found[f"latency_p95_predicted_ms@{la.label}"] = time * la.dense.p95 / la.dense.value
        return self._aliased(found)

    def measured(self, plan: Plan, module: nn.Module | None = None, limits: Sequence[Limit] = ()) -> dict[str, float]:
        """What a plan takes, end to end beside dense.

        Args:
            plan: which.
            module: the built plan, which is measured anew even if the plan was before (None: its structure).
            limits: where one of them is on a time (not on a share of dense), the time is given as it was measured now,
                and not at the pace of dense that the study began with; the longer of both where there are limits of
                both kinds. A module that keeps one of them by less than 2 % is measured twice more, and the slowest
                of the three counts: one session of a runtime differs from the next by about 1 %, and the plans just
                within a limit are those that a fast one put there.
        """
        values: dict[str, float] = {}
        for latency in self.latencies:
            own = [li for li in limits if li.quantity.startswith("latency") and self.named(li.target, li) is latency]
            values |= self._measured(latency, plan, module, own)
        if self.memory and self.latencies:
            found = self.latencies[0].peak_memory(plan, module)
            self._say("a plan's memory", found)
            values |= {MEMORY: found.value, "memory_kept": found.value / self.dense[MEMORY]}
        return self._aliased(values)

    @property
    def elsewhere(self) -> bool:
        """Whether all of it is measured on other machines, so that this one may do something else meanwhile."""
        return all(la.target.elsewhere for la in self.latencies)

    @property
    def nodes(self) -> dict[str, str]:
        """Target → where something was measured on it last, of those that are elsewhere."""
        return {la.label: node for la in self.latencies if (node := la.target.node) is not None}

    def unwanted(self, so: bool) -> None:
        """Whether what another thread measures `apart` is to be given up."""
        for latency in self.latencies:
            latency.target.unwanted(so)

    def apart(self, plan: Plan) -> list[dict[str, Measurement]]:
        """Measure what is not known of a plan, for `keep`; a thread may, while another does all the rest."""
        return [la.apart(plan, self.memory and n == 0) for n, la in enumerate(self.latencies)]

    def keep(self, plan: Plan, found: Sequence[Mapping[str, Measurement]]) -> None:
        """Keep what was measured `apart`: `measured` finds it."""
        for latency, one in zip(self.latencies, found, strict=True):
            latency.keep(plan, one)

    def measure_all(self, plans: Sequence[Plan]) -> None:
        """Measure the latency of plans side by side, which takes less time than one after the other."""
        for latency in self.latencies:
            latency.measure(plans)

    def exceeds(self, plan: Plan, limit: Limit) -> bool:
        """Whether a plan is predicted to break a limit on latency by more than the prediction's own error."""
        if limit.quantity != "latency":
            return False
        latency = self.named(limit.target, limit)
        if not latency.predictable(plan):
            return False
        doubt = 0.10 if latency.error is None else 2 * latency.error.p95
        return latency.predict(plan) > limit.bound(self.dense) * (1 + doubt)

    def report(self) -> list[str]:
        """Lines for the user: how well latencies are predicted, and what was noisy (the worst of every kind)."""
        lines = []
        for la in self.latencies:
            off = f"off by {la.error}" if la.error else "how far it is off is not known, after too few plans"
            lines.append(f"predicted latency on {la.label}: {off}")
            if la.error and la.error.median > WRONG:
                lines[-1] += f"; over {WRONG:.0%} in spite of all that was measured: go by measured latencies only"
        for what, (times, worst) in self._noisy.items():
            lines.append(
                f"{what}: {times} measurement{'s were' if times > 1 else ' was'} noisy; the worst {worst.noise()}"
            )
        return lines

    def keep_pace(self, dense: Mapping[str, float]) -> None:
        """Take the dense model's times that a study began with; what is measured later is recorded at that pace."""
        for latency in self.latencies:
            value, p95 = (dense.get(f"{key}@{latency.label}") for key in ("latency_ms", "latency_p95_ms"))
            if value is not None and p95 is not None:
                latency.keep_pace(value, p95)
                self.dense |= latency.values(latency.dense)
        self.dense = self._aliased(self.dense)

    def recall(self, plan: Plan, measured: Mapping[str, float | None]) -> None:
        """Learn from what a study measured of a plan before."""
        for latency in self.latencies:
            p95 = measured.get(f"latency_p95_ms@{latency.label}")
            kept = measured.get(f"latency_kept@{latency.label}")
            latency.recall(plan, kept, None if p95 is None else p95 / latency.dense.p95)

    def refit(self) -> None:
        """Let predictions learn from what was measured since."""
        for latency in self.latencies:
            latency.refit()

    def ratio(self, key: str, bound: float) -> float:
        """By how much plans measured near `bound` (in ms) were slower than predicted, as a factor.

        Where the bound stands for one on the 95th percentile, that of the plans counts instead of the median.
        """
        latency = self.named(key.partition("@")[2] or None)
        near = []
        for plan, kept, p95_kept in latency.measured_plans():
            took = (p95_kept if key in self._tails else kept) * latency.dense.value
            if abs(took / bound - 1) < _NEAR:
                near.append((abs(took / bound - 1), took / latency.predict(plan)))
        nearest = [factor for _, factor in sorted(near)[:_NEIGHBOURS]]
        # in steps, so that the noise of measuring moves the bound, and with it all plans, only where it has to
        return round(float(np.median(nearest)) / _STEP) * _STEP if nearest else 1.0

    def _measured(
        self, latency: PlanLatency, plan: Plan, module: nn.Module | None, limits: Sequence[Limit]
    ) -> dict[str, float]:
        (found,) = latency.measure([plan], [module])
        values = self._recorded(latency, found, module, limits)
        if module is None or not limits:
            return values

        def violation(values: dict[str, float]) -> float:
            return max(limit.violation(self._aliased(values), self.dense) for limit in limits)

        for _ in range(_SESSIONS - 1):
            if not -_CLOSE < violation(values) <= 0:
                break
            (found,) = latency.measure_again([plan], [module])
            values = max(values, self._recorded(latency, found, module, limits), key=violation)
        return values

    def _recorded(
        self, latency: PlanLatency, found: Measurement, module: nn.Module | None, limits: Sequence[Limit]
    ) -> dict[str, float]:
        """A measurement as a study records it, see `measured`."""
        self._say(f"a plan on {latency.label}", found)
        values = latency.values(found)
        for quantity, now in (("latency", found.value), ("latency_p95", found.p95)):
            own = {li.relative for li in limits if li.quantity == quantity}
            key = f"{measured_key(quantity)}@{latency.label}"
            if module is not None and None in own:
                values[key] = max(now, values[key]) if "dense" in own else now
        return values

    def _aliased(self, values: dict[str, float]) -> dict[str, float]:
        """The first target's values also without its label."""
        end = f"@{self.labels[0]}" if self.latencies else "@"
        return values | {key.removesuffix(end): value for key, value in values.items() if key.endswith(end)}

    def _say(self, what: str, found: Measurement) -> None:
        if found.noisy:
            before = self._noisy.get(what, (0, found))
            worse = found if found.spread + found.others >= before[1].spread + before[1].others else before[1]
            self._noisy[what] = (before[0] + 1, worse)
