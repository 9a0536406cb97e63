"""`Sampling`: Optuna's samplers, asked for numbers in given ranges.

They run on a study of their own in memory, which is filled again from the ledger when a study is resumed. So the ledger
can show what people want to see of a trial (the layers' methods and shares), a sampler sees what it can learn from (a
handful of corrections), and asking costs no transactions.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from rankopt.errors import InputError
from rankopt.pareto import front

Range = tuple[float, float] | tuple[str, ...]  # numbers from a to b, or one of these texts
Number = float | str

optuna.logging.set_verbosity(optuna.logging.WARNING)

_REMEMBERED = 300  # trials that TPE and GP learn from; of more, the best and the newest
_FORGET_EVERY = 100
_YARDSTICK = 8  # first trials whose front the others are measured by, for samplers with a single objective
_MANY = 2000  # trials from which a sampler has to be quick
_POPULATION = 24
_LONGEST_MARK = 256  # characters; what samplers write down of a trial (a generation) is short


@dataclass(frozen=True)
class Told:
    """What became of proposed numbers.

    Attributes:
        numbers: name → value.
        values: the objectives, all to be minimized; None for a trial that failed, and for single objectives that were
            not measured because it was stopped at a limit.
        excess: limit → how far beyond it, kept at 0 or less.
        marks: what the sampler wrote down of the trial.
    """

    numbers: Mapping[str, Number]
    values: Sequence[float | None] | None
    excess: Mapping[str, float] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)


class Sampling:
    """One sampler and what it was told.

    Args:
        name: of `SAMPLERS`, or ``auto``: TPE, and NSGA-II for 2,000 trials and more. (GP took some fifty times as long
            to propose and found less with the ten numbers of `correct`.)
        ranges: name → range.
        objectives: how many there are.
        trials: how many the study shall have; only ``auto`` goes by it.
        seed: of all proposals.

    Raises:
        InputError: there is no such sampler, or what it needs is not installed.
    """

    def __init__(self, name: str, ranges: Mapping[str, Range], objectives: int, trials: int, seed: int) -> None:
        self.ranges = dict(ranges)
        self.name = _automatic(trials) if name == "auto" else name
        if self.name not in SAMPLERS:
            raise InputError(f"sampler: must be auto, {', '.join(SAMPLERS)}, got {name!r}")
        if self.name == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise InputError("sampler cmaes: needs the package cmaes; pip install 'rankopt[cmaes]'")
        self.seed, self.single = seed, self.name in _SINGLE
        self._directions = [optuna.study.StudyDirection.MINIMIZE] * (1 if self.single else objectives)
        self._distributions = {n: _distribution(r) for n, r in self.ranges.items()}
        self._told: list[Told] = []
        self._asked: list[optuna.Trial] = []
        self._yardstick: np.ndarray | None = None
        self._study = self._empty()

    def ask(self, number: int, given: Mapping[str, Number] | None = None) -> tuple[dict[str, Number], dict[str, Any]]:
        """Numbers for the trial after `number` others, and what the sampler wants to remember with it.

        Some of them may be given; the sampler proposes the others.

        The samplers' random state is not kept, so every trial has a sampler of its own, seeded by how many trials there
        were before: a study that was interrupted proposes what it would have proposed without the interruption.
        """
        seed = self.seed if self.name == "qmc" else (self.seed * 1_000_003 + number) % 2**32
        with _quiet():
            self._study.sampler = self._sampler(seed)
            if given:
                self._study.enqueue_trial({n: _inside(v, self.ranges[n]) for n, v in given.items()})
            asked = self._study.ask(self._distributions)
        self._asked.append(asked)
        numbers = dict(asked.params)
        attributes = self._study.get_trials(deepcopy=False)[asked.number].system_attrs
        return numbers, {k: v for k, v in attributes.items() if _is_mark(k, v)}

    def tell(self, told: Told) -> None:
        """What became of numbers that were asked for, in whatever order, or of any others in the ranges."""
        asked = next((a for a in self._asked if dict(a.params) == dict(told.numbers)), None)
        self._told.append(told)
        if asked is not None:
            self._asked.remove(asked)
            for limit, excess in told.excess.items():
                asked.set_constraint(limit, excess)
            values = self._values(told)
            with _quiet():
                state = TrialState.FAIL if values is None else TrialState.COMPLETE
                self._study.tell(asked, values, state=state)
        else:
            self._put(told)
        if self.name in _FORGETFUL and len(self._told) > _REMEMBERED and len(self._told) % _FORGET_EVERY == 0:
            self._restart()

    def recall(self, history: Sequence[Told]) -> None:
        """Take in what earlier runs of the study were told, in their order."""
        self._told = list(history)
        self._restart()

    def _sampler(self, seed: int) -> BaseSampler:
        sampler = SAMPLERS[self.name](seed)
        if isinstance(sampler, _Tpe):
            sampler.ranges = self._distributions
        return sampler

    def _empty(self) -> optuna.Study:
        with _quiet():
            return optuna.create_study(directions=self._directions)

    def _restart(self) -> None:
        """The study in memory anew: all trials, or (for samplers that grow slow) the best and the newest."""
        self._study, self._yardstick, self._asked = self._empty(), None, []
        since = len(self._told) // _FORGET_EVERY * _FORGET_EVERY if self.name in _FORGETFUL else 0
        old = self._told[:since]
        for told in [*(_chosen(old) if since > _REMEMBERED else old), *self._told[since:]]:
            self._put(told)
        if self.name in _EVOLVING and self._told:
            self._choose_parents()

    def _choose_parents(self) -> None:
        """Let the sampler choose the parents of the generation that is under way, if it had before.

        It keeps them in another order than the one in which it uses them the first time.
        """
        generations = [v for t in self._told for k, v in t.marks.items() if k.endswith("generation") and t.values]
        if generations and generations.count(max(generations)) < _POPULATION:
            with _quiet():
                self._study.sampler = SAMPLERS[self.name](self.seed)
                self._study.tell(self._study.ask(self._distributions), state=TrialState.FAIL)

    def _put(self, told: Told) -> None:
        """A finished trial; one whose numbers lie outside of the ranges (the space has moved) is brought inside."""
        if set(told.numbers) != set(self.ranges):
            return
        numbers = {n: _inside(told.numbers[n], self.ranges[n]) for n in self.ranges}
        values = self._values(told)
        if self.name == "qmc":  # its place in the sequence is how often it was asked
            with _quiet():
                self._study.sampler = SAMPLERS[self.name](self.seed)
                self._study.ask(self._distributions)
            return
        trial = create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values, params=numbers, distributions=self._distributions, system_attrs=dict(told.marks),
        )  # fmt: skip
        for limit, excess in told.excess.items():
            trial.set_constraint(limit, excess)
        self._study.add_trial(trial)

    def _values(self, told: Told) -> list[float] | None:
        """What the sampler is told: of a trial that was stopped at a limit the worst that is known, since only by how
        much it broke the limit counts then; None where there is nothing to tell."""
        values = told.values
        if values is None or any(v is not None and not np.isfinite(v) for v in values):
            return None
        if None in values:
            if not any(excess > 0 for excess in told.excess.values()):
                return None
            known = [t.values for t in self._told if t.values is not None and _complete(t.values)]
            worst = np.max(np.array(known, float), axis=0) if known else np.ones(len(values))
            values = [float(w) if v is None else v for v, w in zip(values, worst, strict=True)]
        point = np.array(values, float)
        return [self._beyond(point)] if self.single else [float(v) for v in point]

    def _beyond(self, point: np.ndarray) -> float:
        """How far a point lies behind the front of the first trials, negative where it is ahead (samplers with a single
        objective see this): the smallest over the front of the largest loss in any objective, by factors.

        Zitzler et al., "Performance assessment of multiobjective optimizers", 2003: the ε-indicator.
        """
        if self._yardstick is None:
            known = [t.values for t in self._told if t.values is not None and _complete(t.values)][:_YARDSTICK]
            table = np.array(known, float)
            if len(table) == 0:
                return 0.0
            self._yardstick = table[front(table)]
        low = np.minimum(self._yardstick.min(axis=0), point)
        if (low > 0).all():
            return float((np.log(point) - np.log(self._yardstick)).max(axis=1).min())
        scale = np.maximum(np.ptp(self._yardstick, axis=0), 1e-9)
        return float(((point - self._yardstick) / scale).max(axis=1).min())


def _automatic(trials: int) -> str:
    return "nsga2" if trials >= _MANY else "tpe"


def _is_choice(given: Range) -> bool:
    return isinstance(given[0], str)


def _distribution(given: Range) -> BaseDistribution:
    return CategoricalDistribution(given) if _is_choice(given) else FloatDistribution(*given)


def _inside(value: Number, given: Range) -> Number:
    if _is_choice(given):
        return value if value in given else given[0]
    low, high = (float(g) for g in given)
    return min(max(float(value), low), high)


def _is_mark(key: str, value: Any) -> bool:
    """Whether something that a sampler wrote down is kept: short and plain, no serialized optimizer."""
    plain = isinstance(value, int | float | bool | str) and len(str(value)) <= _LONGEST_MARK
    return plain and not key.startswith(("cma", "constraints", "fixed_params"))


def _complete(values: Sequence[float | None]) -> bool:
    return all(v is not None and np.isfinite(v) for v in values)


def _chosen(told: Sequence[Told]) -> list[Told]:
    """`_REMEMBERED` of them in their order: fronts from the best on, then the newest."""
    left = [n for n, t in enumerate(told) if t.values is not None and _complete(t.values)]
    kept: set[int] = set()
    while left and len(kept) < _REMEMBERED // 2:
        best = [left[i] for i in front([[*told[n].values, max([0.0, *told[n].excess.values()])] for n in left])]  # type: ignore[misc]
        room = _REMEMBERED // 2 - len(kept)
        spread = np.unique(np.linspace(0, len(best) - 1, min(room, len(best))).round().astype(int))
        kept |= {best[i] for i in spread}
        left = [n for n in left if n not in set(best)]
    newest = [n for n in range(len(told) - 1, -1, -1) if n not in kept]
    kept |= set(newest[: max(0, _REMEMBERED - len(kept))])
    return [told[n] for n in sorted(kept)]


class _quiet(warnings.catch_warnings):
    """Optuna marks much of what is used here as experimental."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found


class _Tpe(optuna.samplers.TPESampler):
    """TPE that is told the ranges and need not find them in all trials, again for every trial."""

    ranges: Mapping[str, BaseDistribution] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: self.ranges[name] for name in sorted(self.ranges) if not self.ranges[name].single()}


def _tpe(seed: int) -> BaseSampler:
    return _Tpe(seed=seed, multivariate=True, n_startup_trials=8, n_ei_candidates=48)


def _nsga2(seed: int) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)


def _nsga3(seed: int) -> BaseSampler:
    return optuna.samplers.NSGAIIISampler(seed=seed, population_size=_POPULATION)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8, deterministic_objective=True)


def _cmaes(seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=8, warn_independent_sampling=False)


def _qmc(seed: int) -> BaseSampler:
    return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)


def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": _tpe,
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "gp": _gp,
    "cmaes": _cmaes,
    "qmc": _qmc,
    "random": _random,
}
_SINGLE = ("cmaes",)  # those that know a single objective
_EVOLVING = ("nsga2", "nsga3")  # those that go by generations
_FORGETFUL = ("tpe", "gp")  # those that grow slow with many trials
