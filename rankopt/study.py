"""The loop: propose, solve, evaluate, tell. The only file that imports Optuna; its storage is the only ledger.

Every trial's plan, measurements, violations and notes are in its user attributes; what the study was begun with is in
the study's. One process writes to a study at a time.
"""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankopt.errors import InputError, RankoptError, StudyMismatchError
from rankopt.evaluate import Evaluation
from rankopt.limits import Limit, parse_limit
from rankopt.pareto import hypervolume
from rankopt.plan import Plan
from rankopt.result import MAXIMIZED, Entry, Progress, Result, minimized
from rankopt.space import SearchSpace

_FACTS, _DENSE, _LIMITS = "rankopt:begun_with", "rankopt:dense", "rankopt:limits"
_PLAN, _VALUES, _EXCESS, _NOTES, _REASON = "plan", "measurements", "violations", "notes", "reason"
_MAX_FAILURES = 8
_INTERRUPTED = "interrupted"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Evaluate(Protocol):
    """What measures a plan (see `Evaluator`)."""

    def __call__(self, plan: Plan, limits: Sequence[Limit]) -> Evaluation:
        """Measure."""


def open_storage(url: str | None) -> BaseStorage:
    """An Optuna storage: None (memory), ``sqlite:///file.db`` or any SQL URL, ``journal:///file.log``.

    Folders are made. Raises `InputError`, one line, when it can't be opened.
    """
    if url is None:
        return InMemoryStorage()
    if "://" not in url:
        url = f"journal:///{url}" if url.endswith((".log", ".journal")) else f"sqlite:///{url}"
    scheme, _, rest = url.partition("://")
    if scheme in ("sqlite", "journal"):
        path = Path(rest.removeprefix("/") if scheme == "sqlite" or rest.startswith("//") else rest)
        path = Path(rest[1:]) if rest.startswith("/") else path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"storage {url}: {path.parent} can't be made: {error.strerror}") from None
    try:
        if scheme == "journal":
            return JournalStorage(JournalFileBackend(str(path)))
        return RDBStorage(url, {"connect_args": {"factory": _Connection}} if scheme == "sqlite" else None)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"storage {url}: can't be opened: {text}") from None


class _Connection(sqlite3.Connection):
    """Waits for the disk now and then instead of twenty times a trial; what is committed survives a killed process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with suppress(sqlite3.OperationalError):  # opened for reading only
            self.execute("PRAGMA journal_mode=WAL")
            self.execute("PRAGMA synchronous=NORMAL")


def open_study(
    storage: BaseStorage,
    name: str,
    objectives: Sequence[str],
    facts: Mapping[str, str],
    dense: Mapping[str, float],
    limits: Sequence[Limit],
) -> optuna.Study:
    """Create a study, or open it again if it was begun with the same facts.

    Args:
        storage: from `open_storage`.
        name: of the study.
        objectives: in order.
        facts: what must not change (digests of model, data, space, ...): name → value.
        dense: the dense model's measurements.
        limits: may change from one run to the next.

    Raises:
        StudyMismatchError: names the first fact that differs.
    """
    facts = {"objectives": ", ".join(objectives), **facts}
    directions = [StudyDirection.MAXIMIZE if o in MAXIMIZED else StudyDirection.MINIMIZE for o in objectives]
    with _writable(name):
        if name not in optuna.study.get_all_study_names(storage):
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            study.set_user_attr(_FACTS, dict(facts))
        else:
            study = optuna.load_study(study_name=name, storage=storage)
            _check_facts(study, name, facts)
        study.set_user_attr(_DENSE, dict(dense))
        study.set_user_attr(_LIMITS, [str(li) for li in limits])
    return study


@contextmanager
def _writable(name: str) -> Iterator[None]:
    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ or error
        raise InputError(f"study {name}: its storage can't be written: {str(cause).splitlines()[0]}") from error


def run(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    trials: int,
    seed: int,
    progress: Callable[[Progress], None] = lambda p: None,
) -> None:
    """Go on until the study has `trials` trials that were not interrupted.

    The first are the solved plans without corrections, along the whole range of budgets. Afterwards every other trial
    is asked for right at the limit, since that is where the answer lies; the others explore the front.

    Raises:
        RankoptError: after 8 failures in a row, with the reasons.
        InputError: the storage can't be written.
    """
    with _writable(study.study_name):
        _run(study, space, evaluate, limits, trials, seed, progress)


def _run(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    trials: int,
    seed: int,
    progress: Callable[[Progress], None],
) -> None:
    objectives = study.user_attrs[_FACTS]["objectives"].split(", ")
    _sweep(study)
    seeds = space.seeds(max(1, min(12, trials // 3)))
    start = time.perf_counter()
    frozen = study.get_trials(deepcopy=False)
    measured = {e.plan.digest: e for e in _entries(frozen, limits, study.user_attrs[_DENSE])}
    done = sum(_counts(t) for t in frozen)
    failures: list[str] = []
    while done < trials:
        waiting = any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False))
        if not waiting and done < len(seeds):
            study.enqueue_trial(seeds[done])
        elif not waiting and done % 2 == 1:
            focus = _focus(list(measured.values()), space, limits)
            if focus is not None:
                study.enqueue_trial({"budget": focus})
        study.sampler = _sampler(seed, done)
        trial = study.ask()
        reason = _one(study, trial, space, evaluate, limits, objectives, measured)
        failures = [*failures, f"trial {trial.number}: {reason}"] if reason else []
        if len(failures) >= _MAX_FAILURES:
            raise RankoptError(f"{len(failures)} trials failed in a row; the last: {failures[-1]}")
        done += 1
        result = _result(study, limits, measured.values())
        progress(_progress(result, done, trials, time.perf_counter() - start))


def result_of(study: optuna.Study, limits: Sequence[Limit] | None = None) -> Result:
    """What the study holds, judged by these limits (its own when None)."""
    wanted = [parse_limit(t) for t in study.user_attrs.get(_LIMITS, [])] if limits is None else list(limits)
    return _result(study, wanted, _entries(study.get_trials(deepcopy=False), wanted, study.user_attrs.get(_DENSE, {})))


def read_result(url: str, name: str, limits: Sequence[Limit] | None = None) -> Result:
    """Read a study from storage; needs neither the model nor the data.

    Raises:
        InputError: there is no such study.
    """
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.is_file():
        raise InputError(f"study {name}: nothing was searched yet ({path} does not exist); run: rankopt search")
    storage = open_storage(url)
    known = optuna.study.get_all_study_names(storage)
    if name not in known:
        raise InputError(f"study {name}: not in {url}; it holds {', '.join(sorted(known)) or 'no study'}")
    return result_of(optuna.load_study(study_name=name, storage=storage), limits)


def _one(
    study: optuna.Study,
    trial: optuna.Trial,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    objectives: Sequence[str],
    measured: dict[str, Entry],
) -> str | None:
    """Propose, evaluate and tell one trial; returns why it failed, if it did."""
    try:
        plan = space.suggest(trial)
        trial.set_user_attr(_PLAN, plan.to_dict())
        trial.set_user_attr("predicted_kl", space.predicted(plan))
        again = measured.get(plan.digest)
        if again is not None:  # the corrections led to a plan that is known
            trial.set_user_attr("same_as", again.trial)
            evaluation = Evaluation(
                {k: v for k, v in again.measurements.items() if v is not None}, {}, None, dict(again.notes)
            )
        else:
            evaluation = evaluate(plan, limits)
        values = [evaluation.measurements.get(o) for o in objectives]
        if any(v is not None and not np.isfinite(v) for v in values):
            raise RankoptError(f"measured {dict(zip(objectives, values, strict=True))}")
    except KeyboardInterrupt:
        trial.set_user_attr(_REASON, _INTERRUPTED)
        study.tell(trial, state=TrialState.FAIL)
        raise
    except Exception as error:
        reason = error.message if isinstance(error, RankoptError) else f"{type(error).__name__}: {error}"
        trial.set_user_attr(_REASON, " ".join(reason.split()))
        study.tell(trial, state=TrialState.FAIL)
        return reason
    trial.set_user_attr(_VALUES, evaluation.measurements)
    trial.set_user_attr(_EXCESS, evaluation.violations)
    trial.set_user_attr(_NOTES, evaluation.notes)
    for limit in limits:
        excess = limit.violation(evaluation.measurements, study.user_attrs[_DENSE])
        trial.set_constraint(str(limit), min(excess, 1e6))
    if any(v is None for v in values):
        trial.set_user_attr(_REASON, f"stopped at the limit {evaluation.stopped}")
        study.tell(trial, state=TrialState.PRUNED)
        return None
    study.tell(trial, [v for v in values if v is not None])
    if plan.digest not in measured:
        frozen = study.get_trials(deepcopy=False)[trial.number]
        found = _entries([frozen], limits, study.user_attrs[_DENSE])
        measured[plan.digest] = found[0]
    return None


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    # The sampler's random state is not stored, so every trial has a sampler of its own, seeded by how many were done
    # before: a study that was interrupted and goes on proposes what it would have proposed without the interruption.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is marked experimental
        return optuna.samplers.TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, n_startup_trials=8, n_ei_candidates=48
        )


def _sweep(study: optuna.Study) -> None:
    """Trials that a killed process left running are failed, so that they repel no samples for ever."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, _REASON, _INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)


def _focus(entries: Sequence[Entry], space: SearchSpace, limits: Sequence[Limit]) -> float | None:
    """The budget at which the answer is expected: the limit on cost, or between the cheapest plan that keeps a limit on
    quality and the next one below that does not."""
    if any(li.quantity in ("accuracy", "kl") for li in limits):
        key = f"{space.quantity}_kept"
        kept = [float(e.measurements[key] or 1) for e in entries if e.feasible]
        broken = [float(e.measurements[key] or 1) for e in entries if not e.feasible]
        top = min(kept, default=space.highest)
        below = max((b for b in broken if b < top), default=space.lowest)
        return min(max(below + 0.7 * (top - below), space.lowest), space.highest)
    return space.highest if any(li.quantity == space.quantity for li in limits) else None


def _counts(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and trial.user_attrs.get(_REASON) != _INTERRUPTED


def _entries(trials: Sequence[FrozenTrial], limits: Sequence[Limit], dense: Mapping[str, float]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for trial in trials:
        values = trial.user_attrs.get(_VALUES)
        if values is None or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        plan = Plan.from_dict(trial.user_attrs[_PLAN], f"trial {trial.number}")
        feasible = all(li.violation(values, dense) <= 0 for li in limits)
        found.setdefault(plan.digest, Entry(trial.number, plan, values, feasible, trial.user_attrs.get(_NOTES, {})))
    return list(found.values())


def _result(study: optuna.Study, limits: Sequence[Limit], entries: Any) -> Result:
    attrs = study.user_attrs
    failed = {t.number: t.user_attrs[_REASON] for t in study.get_trials(deepcopy=False) if t.user_attrs.get(_REASON)}
    objectives = tuple(attrs[_FACTS]["objectives"].split(", "))
    return Result(list(entries), objectives, tuple(limits), attrs.get(_DENSE, {}), failed)


def _progress(result: Result, done: int, total: int, seconds: float) -> Progress:
    try:
        best: Mapping[str, float | None] | None = result.best().measurements
    except RankoptError:
        best = None
    return Progress(done, total, seconds, best, volume(result))


def volume(result: Result) -> float:
    """Hypervolume of the front: kl from 3 nats down, costs as shares of dense from 1 down, accuracy from 0 up."""
    scale = np.array([1.0 if o in ("kl", *MAXIMIZED) else result.dense.get(o, 1.0) for o in result.objectives])
    reference = [3.0 if o == "kl" else 0.0 if o in MAXIMIZED else 1.0 for o in result.objectives]
    points = [np.array(minimized(e.measurements, result.objectives)) / scale for e in result.front]
    return hypervolume(points, reference) if points else 0.0


def _check_facts(study: optuna.Study, name: str, facts: Mapping[str, str]) -> None:
    begun = study.user_attrs.get(_FACTS)
    if begun is None:
        raise StudyMismatchError(f"study {name}: this storage holds a study of that name that rankopt did not begin")
    for key in [*facts, *(k for k in begun if k not in facts)]:
        if begun.get(key) != facts.get(key):
            raise StudyMismatchError(
                f"study {name}: was begun with another {key} ({_short(begun.get(key))}, now {_short(facts.get(key))});"
                " take another name or storage, or go back to it"
            )


def _short(value: Any) -> str:
    return json.dumps(value)[:60] if value is not None else "none"


def with_owner(result: Result, owner: Any) -> Result:
    """The same result whose entries can be built."""
    return replace(result, entries=[replace(e, _owner=owner) for e in result.entries])
