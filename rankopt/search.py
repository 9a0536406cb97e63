"""`Search`: from a trained model, data and limits to measured plans and a smaller model.

This is where the torch half and the study meet: everything is prepared in the order of the data flow, and the loop is
handed a function that turns a plan into measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankopt.batches import Batch, count, first, split
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import Group, candidates, default_memory, factor_cache
from rankopt.cost import Cost
from rankopt.cost import count as count_costs
from rankopt.devices import Devices
from rankopt.divergence import Divergence
from rankopt.errors import DataError, InputError, PlanError, UncountedOperationError
from rankopt.evaluate import Evaluator, Metric
from rankopt.executor_options import ExecutorOptions
from rankopt.executors.chosen import chosen as chosen_executor
from rankopt.factors import Factors
from rankopt.goals import checked_limit, checked_objectives
from rankopt.layers import find_layers, fingerprint, run_once
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.precision import chosen
from rankopt.prediction import unpredicted
from rankopt.problem import space_of
from rankopt.refit import Refit, RefitOptions
from rankopt.result import Entry, Progress, Result
from rankopt.saving import saved
from rankopt.short_recovery import ShortRecovery
from rankopt.space import SearchSpace
from rankopt.space_file import Space, load_space, resolve, tied_groups
from rankopt.starting import choices_of, starting_plans
from rankopt.stopping import Stopping
from rankopt.study_arguments import arguments
from rankopt.surgery import checked
from rankopt.targets import read as read_target
from rankopt.targets.target import Target

if TYPE_CHECKING:
    from rankopt.executors.executor import Executor
    from rankopt.study_file import StudyFile

_HELD_BACK = 0.33


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
        strategy, sampler, seeds: how plans are chosen; see `strategies.strategy.Setting`.
        refit: how trials are refitted (None: not).
        refit_samples: calibration samples used for it.
        bn: "auto", "on" or "off"; see `Evaluator`.
        precision: how trials run models, see `precision.chosen`; what a study ends with is measured in float32.
        output, class_dim: see `Divergence.of`.
        threads: torch threads while running (None: as they are).
        memory: bytes to work with besides the dense and a compressed model (None: a quarter of the weights, and at
            least 1 GiB). Where that is not enough, layers are calibrated in chunks and factors wait on disk.
        allow: operations that no counter knows and that shall count as nothing, e.g. ``["mylib::op"]``.
        source: where the model's class is found, ``package.module:Name``; recorded in artifacts.
        targets: where latency is measured, as `Target`s or as on the command line, ``"onnxruntime:threads=2"``. The
            first is meant by limits and objectives that name none.
        cache: folder of latency tables (None: the user's cache folder; False: none).
        retargeted: take over the quality of all plans that another study in the storage measured with the same model,
            data and space; only latency is measured anew.
        recovery: a short training in every trial: steps, `RecoveryOptions` as a mapping, or a `ShortRecovery`.
        start: plans that are measured first, by names for messages, or what returns them when the search begins.
        stopping: what ends the study before it has all its trials: a time limit, or trials without a gain.
        trial_timeout: seconds after which a trial is given up (None: never); see `executors.local`.
        executor: what carries trials out: "local" (this process, one after the other), "ray", options such as
            ``{"name": "ray", "workers": 4}`` (see `ExecutorOptions`), or an `Executor`.
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
        strategy: str = "auto",
        sampler: str = "auto",
        seeds: int | None = None,
        storage: str | None = None,
        name: str = "study",
        refit: RefitOptions | None = RefitOptions(),  # noqa: B008  (frozen)
        refit_samples: int | None = 1024,
        bn: str = "off",
        precision: str = "auto",
        output: str = "auto",
        class_dim: int | None = None,
        options: CalibrationOptions | None = None,
        threads: int | None = None,
        memory: int | None = None,
        allow: Sequence[str] = (),
        source: str | None = None,
        targets: Sequence[Target | str] = (),
        cache: Path | bool | None = None,
        retargeted: bool = False,
        recovery: int | Mapping[str, Any] | ShortRecovery | None = None,
        start: Mapping[str, Plan] | Callable[[], Mapping[str, Plan]] | None = None,
        stopping: Stopping | None = None,
        trial_timeout: float | None = None,
        executor: str | Mapping[str, Any] | ExecutorOptions | Executor | None = None,
    ) -> None:
        self.model, self.source, self.allow = model, source, tuple(allow)
        self.stopping, self.trial_timeout = stopping or Stopping(), trial_timeout
        self.stopped = ""
        self.retargeted, self.recovery, self._start = retargeted, ShortRecovery.of(recovery), start or {}
        self.example, self.example_kwargs = example_input, dict(example_kwargs or {})
        if threads is not None:
            torch.set_num_threads(threads)
        if validation is None:
            if count(calibration) < 2:
                raise DataError("calibration: needs at least 2 samples, of which some are held back to judge plans")
            calibration, validation = split(calibration, _HELD_BACK, seed)
        self.targets = [read_target(t) if isinstance(t, str) else t for t in targets]
        cluster = next((a for t in self.targets if (a := getattr(t, "address", None))), None)  # of a ray-node target
        self.executor = chosen_executor(executor, threads or torch.get_num_threads(), trial_timeout, cluster)
        self.cache = cache
        self.calibration, self.validation, self.tests = list(calibration), list(validation), tests
        self.metric = None if metric == "kl" else metric
        labels = [t.called for t in self.targets]
        self.objectives = checked_objectives(objectives, self.metric, labels, limits)
        self.limits = [checked_limit(limit, self.metric, labels) for limit in limits]
        self.trials, self.seed, self.storage, self.name = trials, seed, storage, name
        self.strategy, self.sampler, self.seeds = strategy, sampler, seeds
        self.space_file = load_space(space)
        self.refit_options, self.refit_samples, self.bn = refit, refit_samples, bn
        self.precision = precision
        self.options = options or CalibrationOptions(seed=seed)
        self.layers = find_layers(model, example_input, example_kwargs)
        self.fingerprint = fingerprint(model, self.layers)
        self.memory = default_memory(model) if memory is None else memory
        self.spaces = resolve(self.space_file, self.layers)
        batch = self.calibration[0]
        self.divergence = Divergence.of(
            run_once(model, batch.args, batch.kwargs, "calibration data"), output, class_dim
        )
        self.progress: Callable[[Progress], None] = lambda p: None
        self._began = time.perf_counter()
        self.recorded: Result | None = None  # what the study holds that entries to be saved come from

    @classmethod
    def from_study(
        cls,
        file: StudyFile,
        limits: Sequence[Limit] | None = None,
        trials: int | None = None,
        storage: str | None = None,
        seed: int | None = None,
        targets: Sequence[Target] | None = None,
        model: nn.Module | None = None,
        executor: Executor | None = None,
    ) -> Search:
        """Build the model and data that a study file names. `storage` is a URL; the others replace the file's."""
        return cls(**arguments(file, limits, trials, storage, seed, targets, model, executor))

    @cached_property
    def cost(self) -> Cost:
        """MACs and parameters of the dense model; where an operation can't be counted, an error that names it."""
        try:
            return count_costs(self.model, self.example, self.example_kwargs, allow=self.allow)
        except UncountedOperationError as error:
            raise UncountedOperationError(f"MACs of the dense model: {error.message}") from None

    @cached_property
    def start(self) -> list[Plan]:
        """The plans that are measured first; raises `PlanError` for one that is another model's."""
        given = self._start() if callable(self._start) else self._start
        return starting_plans(given, self.model, self.layers, self.fingerprint)

    @cached_property
    def _prepared(self) -> tuple[list[Group], Factors]:
        tied = tied_groups(self.space_file, self.layers)
        return candidates(
            self.model, self.layers, self.spaces, tied, self.calibration, self.divergence, progress=self.tell,
            further=choices_of(self.start), **self._gathering,
        )  # fmt: skip

    @property
    def _gathering(self) -> dict[str, Any]:
        statistics = self.space_file.statistics
        return {"options": self.options, "use_statistics": statistics, "max_bytes": self.memory}

    @property
    def _factors(self) -> Factors:
        """The factors; without a search there is no need for the candidates and their predicted losses."""
        if "_prepared" in self.__dict__:
            return self._prepared[1]
        return factor_cache(self.model, self.layers, self.spaces, self.calibration, self.divergence, **self._gathering)

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
        self.devices.prepare(self.groups, self.tell)
        skipped = {la.name: la.skip for la in self.layers if la.skip}
        return space_of(self.groups, self.cost, self.devices, self.limits, self.objectives, self.fingerprint, skipped)

    @cached_property
    def devices(self) -> Devices:
        """The targets, and the dense model measured on them."""
        wanted = [*self.objectives, *(li.quantity for li in self.limits)]
        return Devices(
            self.targets,
            self.model,
            self.layers,
            self.example if isinstance(self.example, tuple) else (self.example,),
            self.example_kwargs,
            memory="memory" in wanted,
            cache=self.cache,
            seed=self.seed,
        )

    @cached_property
    def evaluator(self) -> Evaluator:
        """What measures plans."""
        refit = None
        fast = chosen(self.precision, self.model, self.calibration[0], self.divergence)
        if self.refit_options is not None:
            width = sum(la.out_channels for la in self.layers if la.skip is None)
            rows = max(1, min(self.refit_options.max_rows, self.memory // (8 * max(width, 1))))  # half the memory
            samples = rows if self.refit_samples is None else min(self.refit_samples, rows)
            options = replace(self.refit_options, max_rows=rows)
            refit = Refit(self.model, self.layers, first(self.calibration, samples), options, fast.exact)
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
            fast=fast,
            recovery=self.recovery.on(self.calibration, self.divergence) if self.recovery else None,
        )

    def run(self, progress: Callable[[Progress], None] | None = None) -> Result:
        """Search, or go on with a search in the same storage, until the study has `trials` trials."""
        from rankopt import running

        self.progress, self._began = progress or self.progress, time.perf_counter()
        with self.executor.ready():
            self.recorded = running.run(self)
        return self.recorded

    def tell(self, text: str) -> None:
        """Pass a line on to whoever watches."""
        self.progress(Progress(0, 0, time.perf_counter() - self._began, text=text))

    def notes(self) -> list[str]:
        """What the user should know: why the study ended early, what was not predicted from weights, how far predicted
        latencies are off, what was noisy."""
        groups = self.groups if "_prepared" in self.__dict__ else []
        choices = (choice for group in groups for choice in group.choices)
        return [*([self.stopped] if self.stopped else []), *unpredicted(choices), *self.devices.report()]

    def evaluate(self, plan: Plan) -> Entry:
        """Measure a plan of one's own. Raises `PlanError` or `LayerError` when it does not fit this model."""
        checked(self.model, plan)
        skipped = {la.name: la.skip for la in self.layers if la.skip}
        plan = Plan(plan.layers, plan.fingerprint or self.fingerprint, plan.skipped or skipped)
        self.evaluator.use(self.devices)
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

    def save(
        self,
        entry: Entry,
        directory: str | Path,
        force: bool = False,
        exports: Sequence[str] = (),
        memory: bool = False,
    ) -> dict[str, Any]:
        """Build an entry, save it (with exports in these formats), load it back and measure what was loaded.

        With `memory` peak memory is measured too, on the first target that can, else with torch.

        Returns:
            ``{"validation": {...}, "test": {...} or None}``, measured on the reloaded model.
        """
        return saved(self, entry, Path(directory), force, exports, memory)
