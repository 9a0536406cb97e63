"""The loop: propose, solve, evaluate, tell. With `ledger` the only file that imports Optuna."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from rankopt.errors import InfeasibleError, RankoptError
from rankopt.evaluate import Evaluation
from rankopt.ledger import (
    DENSE,
    EXCESS,
    FACTS,
    NOTES,
    PLAN,
    PLAN_DIGEST,
    REASON,
    VALUES,
    Judged,
    confirm,
    entries_of,
    gathered,
    known_entries,
    result_of,
    writable,
)
from rankopt.limits import Limit, measured_key
from rankopt.pareto import hypervolume
from rankopt.plan import Plan
from rankopt.proposals import focus, sampler, tightened
from rankopt.result import MAXIMIZED, Entry, Progress, Result, minimized
from rankopt.space import SearchSpace

_MAX_FAILURES = 8
_INTERRUPTED = "interrupted"
_FAR = "not measured on the device: another plan is better in everything"
_DOUBT = 0.05  # how far a predicted latency may be off when it is asked whether a plan is worth measuring


class Evaluate(Protocol):
    """What measures a plan (see `Evaluator`)."""

    def __call__(
        self,
        plan: Plan,
        limits: Sequence[Limit],
        worth: Callable[[Mapping[str, float]], bool] = ...,
        known: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """Measure."""


def run(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    trials: int,
    seed: int,
    progress: Callable[[Progress], None] = lambda p: None,
    learn: Callable[[], None] = lambda: None,
    inherited: Sequence[Judged] = (),
) -> None:
    """Go on until the study has `trials` trials that were not interrupted.

    The first are the solved plans without corrections, along the whole range of budgets. Afterwards every other trial
    is asked for right at the limit, since that is where the answer lies; the others explore the front.

    Args:
        study: from `ledger.open_study`.
        space: what is proposed from.
        evaluate: measures a plan.
        limits: what plans have to keep.
        trials: how many the study shall have.
        seed: of the proposals.
        progress: told after every trial.
        learn: called after every trial that was measured, e.g. to correct predicted costs.
        inherited: plans whose quality is known from another study; they come first, and only the rest is measured.

    Raises:
        RankoptError: after 8 failures in a row, with the reasons.
        InputError: the storage can't be written.
    """
    with writable(study.study_name):
        _run(study, space, evaluate, limits, trials, seed, progress, learn, inherited)


def _run(
    study: optuna.Study,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    trials: int,
    seed: int,
    progress: Callable[[Progress], None],
    learn: Callable[[], None],
    inherited: Sequence[Judged],
) -> None:
    objectives = study.user_attrs[FACTS]["objectives"].split(", ")
    _sweep(study)
    seeds = space.seeds(max(1, min(12, trials // 3)))
    start = time.perf_counter()
    frozen = study.get_trials(deepcopy=False)
    entries = known_entries(study, limits)
    measured = {e.plan.digest: e for e in entries if None not in _told(e.measurements, objectives)}
    refused = {t.user_attrs[PLAN_DIGEST] for t in frozen if PLAN_DIGEST in t.user_attrs}
    done = sum(_counts(t) for t in frozen)
    failures: list[str] = []
    for old in inherited:
        if done < trials and old.plan.digest not in (*measured, *refused):
            progress(Progress(done, trials, time.perf_counter() - start, text="measuring plans of an earlier study"))
            done += _inherit(study, old, space, evaluate, limits, objectives, measured)
            learn()
    while done < trials:
        waiting = any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False))
        if not waiting and done < len(seeds):
            study.enqueue_trial(seeds[done])
        elif not waiting and (done % 2 == 1 or done >= trials - 2):
            near = done % 4 == 3 or done >= trials - 2
            entries = list(measured.values())
            asked = (near and tightened(study, entries, space)) or focus(entries, space, limits)
            if asked is not None:
                study.enqueue_trial(asked)
        study.sampler = sampler(seed, done)
        trial = study.ask()
        reason = _one(study, trial, space, evaluate, limits, objectives, measured)
        learn()
        failures = [*failures, f"trial {trial.number}: {reason}"] if reason else []
        if len(failures) >= _MAX_FAILURES:
            raise RankoptError(f"{len(failures)} trials failed in a row; the last: {failures[-1]}")
        done += 1
        result = gathered(study, limits, measured.values())
        told = entries_of([study.get_trials(deepcopy=False)[trial.number]], limits, study.user_attrs[DENSE])
        progress(_progress(result, done, trials, time.perf_counter() - start, next(iter(told), None)))


def confirm_best(study: optuna.Study, limits: Sequence[Limit], again: Callable[[Entry], Mapping[str, float]]) -> None:
    """Have the best plan measured again; when it breaks a limit then, the next best one, until one keeps them all.

    What is measured here counts instead of what the trial measured, now and when the study goes on.
    """
    while True:
        try:
            best = result_of(study, limits).best()
        except InfeasibleError:
            return
        if best.trial < 0 or "confirmed" in best.notes:
            return
        confirm(study, best.plan, again(best))


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
        trial.set_user_attr(PLAN, plan.to_dict())
        trial.set_user_attr("predicted_kl", space.predicted(plan))
        again = measured.get(plan.digest)
        if again is not None:  # the corrections led to a plan that is known
            trial.set_user_attr("same_as", again.trial)
            evaluation = Evaluation(
                {k: v for k, v in again.measurements.items() if v is not None}, {}, None, dict(again.notes)
            )
        else:
            dense = study.user_attrs[DENSE]
            evaluation = evaluate(
                plan, limits, lambda known: _worth(known, list(measured.values()), objectives, limits, dense)
            )
        values = _told(evaluation.measurements, objectives)
        if any(v is not None and not np.isfinite(v) for v in values):
            raise RankoptError(f"measured {dict(zip(objectives, values, strict=True))}")
    except KeyboardInterrupt:
        trial.set_user_attr(REASON, _INTERRUPTED)
        study.tell(trial, state=TrialState.FAIL)
        raise
    except Exception as error:
        trial.set_user_attr(REASON, reason := _reason(error))
        study.tell(trial, state=TrialState.FAIL)
        return reason
    trial.set_user_attr(VALUES, evaluation.measurements)
    trial.set_user_attr(EXCESS, evaluation.violations)
    trial.set_user_attr(NOTES, evaluation.notes)
    for limit in limits:
        excess = limit.violation(evaluation.measurements, study.user_attrs[DENSE])
        trial.set_constraint(str(limit), min(excess, 1e6))
    if any(v is None for v in values):
        trial.set_user_attr(REASON, f"stopped at the limit {evaluation.stopped}" if evaluation.stopped else _FAR)
        study.tell(trial, state=TrialState.PRUNED)
        return None
    study.tell(trial, [v for v in values if v is not None])
    if plan.digest not in measured:
        frozen = study.get_trials(deepcopy=False)[trial.number]
        measured[plan.digest] = entries_of([frozen], limits, study.user_attrs[DENSE])[0]
    return None


def _inherit(
    study: optuna.Study,
    old: Judged,
    space: SearchSpace,
    evaluate: Evaluate,
    limits: Sequence[Limit],
    objectives: Sequence[str],
    measured: dict[str, Entry],
) -> int:
    """Add a plan of another study as a finished trial, its quality as it was, the rest measured.

    Returns:
        How many trials that made: 0 where the plan is not worth one, since it is predicted to break a limit.
    """
    try:
        evaluation = evaluate(old.plan, limits, lambda known: True, old.quality)
    except Exception as error:
        failed = {PLAN: old.plan.to_dict(), PLAN_DIGEST: old.plan.digest, REASON: _reason(error)}
        study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=failed))
        return 1
    values = _told(evaluation.measurements, objectives)
    if any(v is None for v in values):
        return 0
    ranges = {name: FloatDistribution(low, high) for name, (low, high) in space.parameters().items()}
    params = {name: old.params.get(name, 1.0 if name == "exponent" else 0.0) for name in ranges}
    params["budget"] = space.share(evaluation.measurements)
    params = {name: min(max(value, ranges[name].low), ranges[name].high) for name, value in params.items()}
    attributes = {
        PLAN: old.plan.to_dict(),
        VALUES: evaluation.measurements,
        EXCESS: evaluation.violations,
        NOTES: {**evaluation.notes, "inherited": 1.0},
        "predicted_kl": space.predicted(old.plan),
    }
    told = [v for v in values if v is not None]
    study.add_trial(
        optuna.trial.create_trial(values=told, params=params, distributions=dict(ranges), user_attrs=attributes)
    )
    frozen = study.get_trials(deepcopy=False)[-1]
    measured[old.plan.digest] = entries_of([frozen], limits, study.user_attrs[DENSE])[0]
    return 1


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    return error.message if isinstance(error, RankoptError) else " ".join(f"{type(error).__name__}: {error}".split())


def _told(values: Mapping[str, float | None], objectives: Sequence[str]) -> list[float | None]:
    """The objectives' values for the sampler; a latency that was not worth measuring as predicted."""
    keys = [measured_key(o) for o in objectives]
    return [values.get(key, values.get(_predicted(key))) for key in keys]


def _predicted(key: str) -> str:
    return key.replace("_ms", "_predicted_ms") if key.startswith("latency") else key


def _worth(
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


def _sweep(study: optuna.Study) -> None:
    """Trials that a killed process left running are failed, so that they repel no samples for ever."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, REASON, _INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)


def _counts(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and trial.user_attrs.get(REASON) != _INTERRUPTED


def _progress(result: Result, done: int, total: int, seconds: float, entry: Entry | None) -> Progress:
    try:
        best: Mapping[str, float | None] | None = result.best().measurements
    except RankoptError:
        best = None
    return Progress(done, total, seconds, best, volume(result), entry=entry)


def volume(result: Result) -> float:
    """Hypervolume of the front: kl from 3 nats down, costs as shares of dense from 1 down, accuracy from 0 up."""
    scale = np.array(
        [1.0 if o in ("kl", *MAXIMIZED) else result.dense.get(measured_key(o), 1.0) for o in result.objectives]
    )
    reference = [3.0 if o == "kl" else 0.0 if o in MAXIMIZED else 1.0 for o in result.objectives]
    points = [np.array(minimized(e.measurements, result.objectives)) / scale for e in result.front]
    return hypervolume(points, reference) if points else 0.0
