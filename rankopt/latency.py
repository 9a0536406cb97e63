"""`PlanLatency`: the latency of whole plans of one model on one target: predicted for all, measured for some.

The prediction is linear in what a plan's layers contribute, so that the integer program can use it: the table's times,
their weights' sizes (a layer alone finds its weights in the cache, a layer in a network often does not), and a factor a
method. It is fitted on plans that were measured whole beside the dense model, and knows its error on plans that it was
not fitted on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.errors import InputError, KilledError
from rankopt.latency_fit import Array, PredictionError, fitted, left_out
from rankopt.latency_probes import random_plans, solved_plans
from rankopt.latency_store import store_of
from rankopt.latency_table import LatencyTable, randomized
from rankopt.layer_spec import LayerSpec
from rankopt.layers import architecture_digest, find_layers
from rankopt.measurement import Measurement
from rankopt.nest import shapes, with_batch
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.surgery import structure
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

EFFORT = Effort(seconds=0.4, rounds=11, error=0.01, longest=3, repeats=1)
PROBES = 24  # random plans that the correction is fitted on at first
SOLVED = (6, 6)  # solved plans that it is fitted on besides, in two rounds
WRONG = 0.10  # a median error above it calls for more of them
_LEAST = 0.02  # an error of prediction below this is not told from the noise of measuring
_AT_ONCE = 6  # plans measured side by side with dense


class PlanLatency:
    """Latencies of plans of one model on one target.

    Args:
        target: where.
        model: the dense model.
        layers: from `find_layers`.
        args, kwargs: the example input.
        cache: a folder for what is measured (None: the user's cache folder; False: nothing is kept on disk).
        seed: of the plans that are drawn for the fit.
        effort: of a measurement of whole models.

    Raises:
        InputError: the target is not there, or can't run the model.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module,
        layers: Sequence[LayerSpec],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        cache: Path | bool | None = None,
        seed: int = 0,
        effort: Effort = EFFORT,
    ) -> None:
        self.target, self.model, self.seed, self.effort = target, model, seed, effort
        self.args, self.kwargs = with_batch((args, dict(kwargs or {})), target.batch)
        self.conditions = target.conditions()
        sized = layers if target.batch is None else find_layers(model, self.args, self.kwargs)
        self.layers = {layer.name: layer for layer in sized}
        layer_target = target.for_layers()
        self.store = store_of(cache, self.conditions)
        layer_store = self.store if layer_target is target else store_of(cache, layer_target.conditions())
        self.table = LatencyTable(layer_target, layer_store, neighbours=target.neighbours)
        self._whole = f"plan: {architecture_digest(model, list(layers))}, input {shapes((self.args, self.kwargs))}"
        self._dense_subject = Subject(model, self.args, self.kwargs, self._key(Plan({})))
        self._groups: list[Group] = []
        self._searched: list[str] = []
        self._methods: list[str] = []
        self._sums = (1.0, 1.0)
        self._parts: dict[tuple[str, LayerChoice], Array] = {}
        self._probes: dict[str, tuple[Plan, float, float]] = {}  # digest → plan, measured shares of dense (p95 last)
        self._unseen: dict[str, tuple[Plan, float, float]] = {}  # those of them measured since the last fit
        self._fitted: Array | None = None
        self.error: PredictionError | None = None
        dense = self.store.get(self._key(Plan({})))
        if dense is None:
            dense = self._run([self._dense_subject])[0]
            self.store.put(self._key(Plan({})), dense)
        self.dense = dense

    @property
    def label(self) -> str:
        """The target's name in limits and tables."""
        return self.target.called

    def keep_pace(self, value: float, p95: float) -> None:
        """Take these for the dense model's times (in ms), which all others are recorded relative to."""
        self.dense = replace(self.dense, value=value, p95=p95)

    def prepare(self, groups: Sequence[Group], progress: Callable[[str], None] = lambda text: None) -> None:
        """Fill the table for these candidates, measure some plans, and fit the correction.

        Where the error is large, more is measured: layers that were interpolated, layers between others, more plans.
        """
        self._groups = list(groups)
        layers = [(self.layers[la.name], g.choices) for g in groups for la in g.layers]
        self._searched = [layer.name for layer, _ in layers]
        self._methods = sorted({c.method for _, choices in layers for c in choices if c != DENSE})
        self._fill(progress)
        self._measure_random(PROBES, progress)
        self._fit()
        for count in SOLVED:  # the second round is solved with what the first one taught
            costs = [self.costs(group) for group in self._groups]
            self._measure_some(solved_plans(self._groups, costs, self.dense.value - self.fixed, count), progress)
            self._fit()
        remedies: list[tuple[str, Callable[[], None]]] = [
            ("layers whose time was interpolated", lambda: self.refine([p for p, *_ in self._probes.values()])),
            ("layers between others", lambda: self._in_context(progress)),
            *[("more plans", lambda n=n: self._measure_random(n, progress)) for n in (2 * PROBES, 3 * PROBES)],
        ]
        for what, remedy in remedies:
            if self.error is None or self.error.median <= WRONG:
                break
            progress(f"latency on {self.label} is predicted with an error of {self.error.median:.0%}: measuring {what}")
            remedy()
            self._fit()

    def _fill(self, progress: Callable[[str], None]) -> None:
        layers = [(self.layers[la.name], g.choices) for g in self._groups for la in g.layers]
        self.table.fill(layers, progress)
        self._parts.clear()
        time = sum(self.table.time(layer, DENSE) for layer, _ in layers)
        self._sums = max(time, 1e-12), max(float(sum(layer.params for layer, _ in layers)), 1.0)

    def _in_context(self, progress: Callable[[str], None]) -> None:
        """Measure layers between others, for those that mislead when they are alone; what predicts better stays."""
        if self.table.neighbours or all(self.layers[name].kind != "conv2d" for name in self._searched):
            return
        alone, error = self.table, self.error
        self.table = LatencyTable(alone.target, alone.store, neighbours=True)
        self._fill(progress)
        self._fit()
        if self.error is None or error is None or self.error.median >= error.median:
            self.table = alone
            self._fill(progress)

    def predict(self, plan: Plan) -> float:
        """Milliseconds of a plan."""
        return float(self._coefficients() @ self._features(plan)) * self.dense.value

    def costs(self, group: Group) -> Array:
        """(choices,) milliseconds that each choice of a group adds, as predicted; with `fixed` they sum to a plan's."""
        rows = np.array([sum(self._part(la.name, choice) for la in group.layers) for choice in group.choices])
        return rows @ self._coefficients() * self.dense.value

    @property
    def fixed(self) -> float:
        """Milliseconds of everything that is in no group."""
        return float(self._coefficients() @ self._outside()) * self.dense.value

    def measure(self, plans: Sequence[Plan], modules: Sequence[nn.Module | None] | None = None) -> list[Measurement]:
        """Measure plans end to end, beside the dense model; what is measured is kept and improves the prediction.

        Args:
            plans: which; known ones are not measured again unless a module is given.
            modules: what to run in a plan's place (None: its structure with random weights, which takes the same time).
        """
        given = list(modules or [None] * len(plans))
        known = [self.store.get(self._key(plan)) for plan in plans]
        found = {n: one for n, one in enumerate(known) if one is not None and given[n] is None}
        todo = [n for n in range(len(plans)) if n not in found]
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            subjects = [self._subject(plans[n], given[n]) for n in part]
            measurements = self._run([self._dense_subject, *subjects])[1:]
            for n, one in zip(part, measurements, strict=True):
                found[n] = one
                self.store.put(self._key(plans[n]), one)
        for n, plan in enumerate(plans):
            self.recall(plan, found[n].kept, found[n].p95_kept)
            if n in todo and plan.digest in self._probes:
                self._unseen[plan.digest] = self._probes[plan.digest]
        return [found[n] for n in range(len(plans))]

    def apart(self, plan: Plan, memory: bool) -> dict[str, Measurement]:
        """Measure what is not known of a plan, without keeping it: a thread may, while another does all the rest."""
        subject = self._subject(plan, None) if plan.changed() else self._dense_subject
        key, found = self._key(plan), {}
        if self.store.get(key) is None:
            found[key] = self._run([self._dense_subject, subject])[1]
        if memory and self.store.get(f"memory of {key}") is None:
            found[f"memory of {key}"] = self.target.peak_memory(subject)
        return found

    def keep(self, plan: Plan, found: Mapping[str, Measurement]) -> None:
        """Keep what was measured `apart`, as `measure` keeps it."""
        for key, one in found.items():
            self.store.put(key, one)
            if one.unit == "ms":
                self.recall(plan, one.kept, one.p95_kept)
        if self._key(plan) in found and plan.digest in self._probes:
            self._unseen[plan.digest] = self._probes[plan.digest]

    def peak_memory(self, plan: Plan, module: nn.Module | None = None) -> Measurement:
        """Peak memory of a plan's inference on this target, in MiB; known ones are not measured again."""
        key = f"memory of {self._key(plan)}"
        known = self.store.get(key)
        if known is None or module is not None:
            known = self.target.peak_memory(self._subject(plan, module) if plan.changed() else self._dense_subject)
            self.store.put(key, known)
        return known

    def values(self, found: Measurement) -> dict[str, float]:
        """What a study records of a measurement: the ratio as measured, and times at the dense model's pace.

        Times are the measured ratio times the dense model's latency that the study began with, so they can be compared
        over hours in which the machine's pace changes.
        """
        kept = 1.0 if found.kept is None else found.kept
        p95_kept = 1.0 if found.p95_kept is None else found.p95_kept
        label = self.label
        return {
            f"latency_ms@{label}": kept * self.dense.value,
            f"latency_p95_ms@{label}": p95_kept * self.dense.p95,
            f"latency_kept@{label}": kept,
            f"latency_spread@{label}": (found.kept_high or kept) - (found.kept_low or kept),
        }

    def measure_again(
        self, plans: Sequence[Plan], modules: Sequence[nn.Module | None] | None = None
    ) -> list[Measurement]:
        """Measure plans once more, without keeping it: what comes out differently is the noise of measuring."""
        found: list[Measurement] = []
        pairs = list(zip(plans, modules or [None] * len(plans), strict=True))
        for start in range(0, len(plans), _AT_ONCE):
            subjects = [self._subject(plan, module) for plan, module in pairs[start : start + _AT_ONCE]]
            found += self._run([self._dense_subject, *subjects])[1:]
        return found

    def measured_plans(self) -> list[tuple[Plan, float, float]]:
        """Plans that were measured, and the shares of dense's median and of its 95th percentile that they took."""
        return list(self._probes.values())

    def recall(self, plan: Plan, kept: float | None, p95_kept: float | None = None) -> None:
        """Learn from a plan that was measured, perhaps by an earlier run of the study; passed over if not `covered`."""
        if plan.changed() and kept is not None and self.covered(plan):
            self._probes[plan.digest] = (plan, kept, kept if p95_kept is None else p95_kept)

    def covered(self, plan: Plan) -> bool:
        """Whether the layers and methods of a plan are among those that `prepare` was called for."""
        return all(n in self._searched and c.method in self._methods for n, c in plan.changed().items())

    def predictable(self, plan: Plan) -> bool:
        """Whether `predict` has anything to say about a plan: `prepare` was called, and covers it."""
        return self._fitted is not None and self.covered(plan)

    def refit(self) -> None:
        """Fit again, if a plan that was measured since came out otherwise than predicted; its layers are then measured.

        A plan that came out as predicted, within the prediction's own error, teaches nothing but the noise of this
        measurement: with it left out, a search on a busy machine proposes the plans that it would on a quiet one.
        """
        if self._fitted is None:
            return
        took = {p: kept * self.dense.value for p, kept, _ in self._unseen.values()}
        missed = {p: abs(self.predict(p) / ms - 1) for p, ms in took.items()}
        expected = WRONG if self.error is None else max(self.error.p95, _LEAST)
        if any(miss > expected for miss in missed.values()):
            with suppress(KilledError):  # the next plan that is off will have them measured
                self.refine([p for p, miss in missed.items() if miss > WRONG])
            self._fit()

    def refine(self, plans: Sequence[Plan]) -> None:
        """Measure the layers of these plans whose time is only interpolated."""
        for plan in plans:
            for name, choice in plan.changed().items():
                if name in self.layers:
                    self.table.measure(self.layers[name], [choice])
        self._parts.clear()

    def _run(self, subjects: Sequence[Subject]) -> list[Measurement]:
        return self.target.measure(subjects, self.effort)

    def _subject(self, plan: Plan, module: nn.Module | None) -> Subject:
        if module is None:
            module = structure(self.model, Plan(plan.layers))
            for part in (m for n, m in module.named_modules() if n in plan.changed()):
                randomized(part)
        return Subject(module, self.args, self.kwargs, self._key(plan))

    def _key(self, plan: Plan) -> str:
        changed = {name: str(choice) for name, choice in sorted(plan.changed().items())}
        if not changed:
            return f"{self._whole}; dense"
        return f"{self._whole}; {hashlib.sha256(repr(changed).encode()).hexdigest()[:24]}"

    def _measure_random(self, wanted: int, progress: Callable[[str], None]) -> None:
        self._measure_some(random_plans(self._groups, wanted, self.seed), progress)

    def _measure_some(self, plans: Sequence[Plan], progress: Callable[[str], None]) -> None:
        plans = list(dict.fromkeys(plans))
        unknown = sum(self.store.get(self._key(p)) is None for p in plans)
        for start in range(0, len(plans), _AT_ONCE):
            if unknown:
                progress(f"timing whole plans on {self.label}: {min(start + _AT_ONCE, len(plans))} of {len(plans)}")
            self.measure(plans[start : start + _AT_ONCE])

    def _coefficients(self) -> Array:
        if self._fitted is None:
            raise InputError("latency: nothing was fitted yet; call prepare")
        return self._fitted

    def _fit(self) -> None:
        """Fit the correction to all measured plans."""
        self._unseen.clear()
        plans = list(self._probes.values())
        rows = np.array([self._features(Plan({})), *(self._features(p) for p, _, _ in plans)])
        kept = np.array([1.0, *(k for _, k, _ in plans)])
        self._fitted, self.error = fitted(rows, kept), left_out(rows, kept)

    def _features(self, plan: Plan) -> Array:
        total = self._outside()
        for name in self._searched:
            total = total + self._part(name, plan.layers.get(name, DENSE))
        return total

    def _outside(self) -> Array:
        return np.array([0.0, 0.0, 1.0] + [0.0] * len(self._methods))

    def _part(self, name: str, choice: LayerChoice) -> Array:
        """What a layer's choice adds to the features: share of the dense time, of the weights, and that per method."""
        if (name, choice) not in self._parts:
            layer = self.layers[name]
            out = self._outside() * 0
            out[0] = self.table.time(layer, choice) / self._sums[0]
            out[1] = (
                layer.params if choice == DENSE else method(choice.method).params(layer, choice.ranks)
            ) / self._sums[1]
            if choice.method in self._methods:
                out[3 + self._methods.index(choice.method)] = out[0]
            self._parts[name, choice] = out
        return self._parts[name, choice]
