"""`Search`: from a trained model, data and limits to measured plans and a smaller model.

This is where the torch half and the study meet: everything is prepared in the order of the data flow, and the loop is
handed a function that turns a plan into measurements.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankopt import artifact
from rankopt.batches import Batch, count, digest, first, split
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import Group, candidates, default_memory, factor_cache
from rankopt.cost import Cost
from rankopt.cost import count as count_costs
from rankopt.divergence import Divergence
from rankopt.errors import DataError, InputError, LimitError, PlanError, UncountedOperationError
from rankopt.evaluate import Evaluator, Metric
from rankopt.factors import Factors
from rankopt.layers import find_layers, fingerprint, run_once
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.refit import Refit, RefitOptions
from rankopt.result import Entry, Progress, Result
from rankopt.space import SearchSpace
from rankopt.space_file import Space, load_space, resolve, tied_groups
from rankopt.surgery import checked

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile

_HELD_BACK = 0.33
_EXACT = ("macs", "params")


class Search:
    """A search that can be prepared, run, resumed and asked.

    Args:
        model: the trained dense model; it is not changed.
        example_input: a tensor or the tuple of positional arguments; costs are counted for it.
        example_kwargs: keyword arguments of that call.
        calibration, validation: batches; validation is held back from the calibration data when None.
        tests: batches of the test split, used by `measure` only.
        metric: "accuracy", None, or ``metric(module, batches) -> float`` (higher is better).
        limits: what the result must keep.
        objectives: names; the default is accuracy (kl without a metric) and macs.
        space: a search space in any form that `load_space` takes.
        trials, seed, storage, name: of the study. Without storage it lives in memory.
        refit: how trials are refitted (None: not).
        refit_samples: calibration samples used for it.
        bn: "auto", "on" or "off"; see `Evaluator`.
        output, class_dim: see `Divergence.of`.
        threads: torch threads while running (None: as they are).
        memory: bytes to work with besides the dense and a compressed model (None: a quarter of the weights, and at
            least 1 GiB). Layers are calibrated in chunks, factors wait on disk, and the refit takes fewer output
            positions where this is not enough.
        allow: operations that no counter knows and that shall count as nothing, e.g. ``["mylib::op"]``.
        source: where the model's class is found, ``package.module:Name``; recorded in artifacts.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        calibration: Sequence[Batch],
        validation: Sequence[Batch] | None = None,
        tests: Sequence[Batch] | None = None,
        metric: Metric | str | None = None,
        limits: Sequence[Limit] = (),
        objectives: Sequence[str] | None = None,
        space: str | Path | Mapping[str, Any] | Space | None = None,
        trials: int = 64,
        seed: int = 0,
        storage: str | None = None,
        name: str = "study",
        refit: RefitOptions | None = RefitOptions(),  # noqa: B008  (frozen)
        refit_samples: int | None = 1024,
        bn: str = "off",
        output: str = "auto",
        class_dim: int | None = None,
        options: CalibrationOptions | None = None,
        threads: int | None = None,
        memory: int | None = None,
        allow: Sequence[str] = (),
        source: str | None = None,
    ) -> None:
        self.model, self.source, self.allow = model, source, tuple(allow)
        self.example, self.example_kwargs = example_input, dict(example_kwargs or {})
        if threads is not None:
            torch.set_num_threads(threads)
        if validation is None:
            if count(calibration) < 2:
                raise DataError("calibration: needs at least 2 samples, of which some are held back to judge plans")
            calibration, validation = split(calibration, _HELD_BACK, seed)
        self.calibration, self.validation, self.tests = list(calibration), list(validation), tests
        self.metric = None if metric == "kl" else metric
        self.objectives = _checked_objectives(objectives, self.metric)
        self.limits = [_supported(limit, self.metric) for limit in limits]
        self.trials, self.seed, self.storage, self.name = trials, seed, storage, name
        self.space_file = load_space(space)
        self.refit_options, self.refit_samples, self.bn = refit, refit_samples, bn
        self.options = options or CalibrationOptions(seed=seed)
        self.layers = find_layers(model, example_input, example_kwargs)
        self.fingerprint = fingerprint(model, self.layers)
        self.memory = default_memory(model) if memory is None else memory
        self.spaces = resolve(self.space_file, self.layers)
        batch = self.calibration[0]
        self.divergence = Divergence.of(
            run_once(model, batch.args, batch.kwargs, "calibration data"), output, class_dim
        )
        self._progress: Callable[[Progress], None] = lambda p: None

    @classmethod
    def from_study(
        cls,
        file: StudyFile,
        limits: Sequence[Limit] | None = None,
        trials: int | None = None,
        storage: str | None = None,
        seed: int | None = None,
    ) -> Search:
        """Build the model and data that a study file names. `storage` is a URL; the others replace the file's."""
        if file.target.name != "none":
            raise InputError(f"{file.path}: target: {file.target.name!r} is not known; known: none")
        torch.set_num_threads(file.threads)
        splits = file.splits()
        args, kwargs = file.example()
        spec = file.model.call
        return cls(
            file.build_model(),
            args,
            kwargs,
            calibration=splits["calibration"],
            validation=splits.get("validation"),
            tests=splits.get("test"),
            metric=file.metric_function() or file.metric,
            limits=file.limits if limits is None else limits,
            objectives=file.goals,
            space=file.load_space(),
            trials=file.trials if trials is None else trials,
            seed=file.seed if seed is None else seed,
            storage=storage or file.storage_url,
            name=file.name,
            refit=RefitOptions() if file.refit.enabled else None,
            refit_samples=file.refit.samples,
            bn=file.recovery.bn,
            output=file.output.kind,
            class_dim=file.output.class_dim,
            allow=file.allow,
            source=None if spec.partition(":")[0].endswith(".py") else spec,
        )

    @cached_property
    def cost(self) -> Cost:
        """MACs and parameters of the dense model; where an operation can't be counted, an error that names it."""
        try:
            return count_costs(self.model, self.example, self.example_kwargs, allow=self.allow)
        except UncountedOperationError as error:
            raise UncountedOperationError(f"MACs of the dense model: {error.message}") from None

    @cached_property
    def _prepared(self) -> tuple[list[Group], Factors]:
        return candidates(
            self.model,
            self.layers,
            self.spaces,
            tied_groups(self.space_file, self.layers),
            self.calibration,
            self.divergence,
            options=self.options,
            use_statistics=self.space_file.statistics,
            max_bytes=self.memory,
            progress=lambda text: self._progress(Progress(0, 0, 0.0, text=text)),
        )

    @property
    def _factors(self) -> Factors:
        """The factors; without a search there is no need for the candidates and their predicted losses."""
        if "_prepared" in self.__dict__:
            return self._prepared[1]
        return factor_cache(
            self.model,
            self.layers,
            self.spaces,
            self.calibration,
            self.divergence,
            options=self.options,
            use_statistics=self.space_file.statistics,
            max_bytes=self.memory,
        )

    @property
    def groups(self) -> list[Group]:
        """The candidates of every layer."""
        return self._prepared[0]

    @cached_property
    def space(self) -> SearchSpace:
        """What the study proposes from; raises `InfeasibleError` when nothing can keep the limits."""
        if not self.groups:
            why = next((f"{la.name}: {la.skip}" for la in self.layers if la.skip), "the search space leaves them dense")
            raise InputError(
                f"model: none of its {len(self.layers)} layers can be decomposed" + (f" ({why})" if self.layers else "")
            )
        totals = {"macs": float(self.cost.macs), "params": float(self.cost.params)}
        fixed = {q: totals[q] - sum(getattr(la, q) for g in self.groups for la in g.layers) for q in totals}
        bounds: dict[str, float] = {}
        for limit in self.limits:
            if limit.quantity in _EXACT:
                bounds[limit.quantity] = min(limit.bound(totals), bounds.get(limit.quantity, float("inf")))
        quantity = next((o for o in self.objectives if o in _EXACT), "macs")
        if quantity not in bounds and bounds:
            quantity = next(iter(bounds))
        skipped = {la.name: la.skip for la in self.layers if la.skip}
        return SearchSpace(self.groups, fixed, totals, bounds, quantity, self.fingerprint, skipped)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What measures plans."""
        refit = None
        if self.refit_options is not None:
            width = sum(la.out_channels for la in self.layers if la.skip is None)
            rows = max(1, min(self.refit_options.max_rows, self.memory // (8 * max(width, 1))))  # half the memory
            samples = rows if self.refit_samples is None else min(self.refit_samples, rows)
            options = replace(self.refit_options, max_rows=rows)
            refit = Refit(self.model, self.layers, first(self.calibration, samples), options)
        return Evaluator(
            self.model,
            self.layers,
            self._factors,
            self.cost,
            self.validation,
            self.divergence,
            metric=self.metric,
            refit=refit,
            bn=self.bn,
            bn_batches=self.calibration,
        )

    def run(self, progress: Callable[[Progress], None] | None = None) -> Result:
        """Search, or go on with a search in the same storage, until the study has `trials` trials."""
        from rankopt import study

        self._progress = progress or self._progress
        space = self.space
        opened = self._open()
        study.run(opened, space, self.evaluator, self.limits, self.trials, self.seed, self._progress)
        return study.with_owner(study.result_of(opened, self.limits), self)

    def evaluate(self, plan: Plan) -> Entry:
        """Measure a plan of one's own. Raises `PlanError` or `LayerError` when it does not fit this model."""
        checked(self.model, plan)
        skipped = {la.name: la.skip for la in self.layers if la.skip}
        plan = Plan(plan.layers, plan.fingerprint or self.fingerprint, plan.skipped or skipped)
        evaluation = self.evaluator(plan, [])
        feasible = all(li.violation(evaluation.measurements, self.evaluator.dense) <= 0 for li in self.limits)
        return Entry(-1, plan, evaluation.measurements, feasible, evaluation.notes, self)

    def build(self, plan: Plan, bn: bool | None = None) -> nn.Module:
        """The compressed model, refitted as in a trial."""
        if plan.fingerprint is not None and plan.fingerprint != self.fingerprint:
            checked(self.model, plan)  # raises with the difference
            raise PlanError("plan: made for another model")
        return self.evaluator.build(plan, bn)

    def measure(self, module: nn.Module, split: str = "validation") -> dict[str, float]:
        """kl and accuracy of a module on a split: "validation" or "test"."""
        if split not in ("validation", "test"):
            raise InputError(f"split: must be validation or test, got {split!r}")
        batches = self.validation if split == "validation" else self.tests
        if batches is None:
            raise DataError("test: the study has no test split")
        return self.evaluator.quality(module, batches)

    def save(self, entry: Entry, directory: str | Path, force: bool = False) -> dict[str, Any]:
        """Build an entry, save it, load it back and measure what was loaded.

        Returns:
            ``{"validation": {...}, "test": {...} or None}``, measured on the reloaded model.
        """
        built = self.build(entry.plan, bn=bool(entry.notes.get("bn", 0)))
        costs = self.evaluator.costs(entry.plan)
        compressed: dict[str, Any] = {**costs, **self.measure(built)}
        measurements: dict[str, Any] = {"dense": dict(self.evaluator.dense), "compressed": compressed}
        if self.tests is not None:
            measurements["dense_test"] = self.measure(self.model, "test")
            measurements["compressed_test"] = self.measure(built, "test")
        artifact.save(directory, built, entry.plan, measurements=measurements, source=self.source, force=force)
        loaded = artifact.load(directory, self.model)
        test = {**costs, **self.measure(loaded, "test")} if self.tests is not None else None
        return {"validation": {**costs, **self.measure(loaded)}, "test": test}

    def _open(self) -> Any:
        from rankopt import study

        dense = self.evaluator.dense
        return study.open_study(
            study.open_storage(self.storage), self.name, self.objectives, self._facts(), dense, self.limits
        )

    def _facts(self) -> dict[str, str]:
        space = json.dumps({n: repr(s) for n, s in self.spaces.items()}, sort_keys=True) + repr(self.space_file.tied)
        return {
            "model": self.fingerprint.architecture,
            "weights": self.fingerprint.weights,
            "calibration data": digest(self.calibration),
            "validation data": digest(self.validation),
            "search space": hashlib.sha256(space.encode()).hexdigest()[:16],
            "metric": self.metric if isinstance(self.metric, str) else "a callable" if self.metric else "none",
            "refit": repr(self.refit_options) + f" on {self.refit_samples} samples",
            "bn": self.bn,
        }


def _checked_objectives(given: Sequence[str] | None, metric: Any) -> tuple[str, ...]:
    """The objectives, or the default: accuracy (kl without a metric) and macs."""
    if given is None or (not isinstance(given, str) and len(given) == 0):
        return ("accuracy" if metric else "kl", "macs")
    known = ["accuracy", "kl", *_EXACT] if metric else ["kl", *_EXACT]
    wrong = [o for o in ([given] if isinstance(given, str) else given) if o not in known]
    if isinstance(given, str) or wrong:
        raise InputError(
            f"objectives: needs a list out of {', '.join(known)}, got {given if not wrong else wrong[0]!r}"
        )
    if len(set(given)) < len(given) or not {"accuracy", "kl"} & set(given):
        raise InputError(f"objectives: each stands once, and accuracy or kl is among them, got {', '.join(given)}")
    return tuple(given)


def _supported(limit: Limit, metric: Any) -> Limit:
    if limit.quantity in ("latency", "latency_p95", "memory"):
        raise LimitError(f"limit {str(limit)!r}: {limit.quantity} is not measured without a target")
    if limit.quantity == "accuracy" and not metric:
        raise LimitError(f"limit {str(limit)!r}: accuracy needs a metric other than kl")
    return limit
