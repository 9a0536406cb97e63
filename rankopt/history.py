"""`History`: every trial of a study, how its front grew, and which of the numbers that it proposed mattered.

A `Result` holds the plans that were measured; this holds the trials, failed and interrupted ones included. It is read
from storage and needs neither the model nor the data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from rankopt.begun import FACTS
from rankopt.ledger import CONFIRMED, ENVIRONMENT, NOTES, PLAN, REASON, VALUES, read_study, result_of
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.result import MAXIMIZED, Result
from rankopt.worth import Grown

FRONT = "the front"
FEWEST = 8  # finished trials below which importances are chance
_GOOD = 5  # trials that importances should at least be read from
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Trial:
    """One trial as its study holds it.

    Attributes:
        number: in the study.
        state: "complete"; "stopped" at a limit or because another plan is better; "failed"; "running"; "waiting".
        params: what was proposed: name → number or text.
        measurements: quantity → value; those of the last measurement, if the plan was measured again.
        plan: what was decided (None: the trial did not come so far).
        feasible: whether it keeps the limits (None: it was not measured).
        predicted_kl: the summed predicted losses of its candidates, in nats.
        same_as: the trial that had this plan before.
        reason: why it was stopped or failed.
        notes: facts needed to build the plan again, and the seconds it took.
        begun: when.
        seconds: from asking to telling.
        environment: the seed, and the machine and versions that it was measured with.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    measurements: Mapping[str, float | None]
    plan: Plan | None = None
    feasible: bool | None = None
    predicted_kl: float | None = None
    same_as: int | None = None
    reason: str | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    begun: datetime | None = None
    seconds: float | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """A study with its past.

    Attributes:
        name: of the study.
        result: its measured plans.
        trials: all of them, by number.
        importances: what for (an objective, or `FRONT`: reaching it) → parameter → share of the importance, the
            largest first; empty where there are too few trials.
        facts: what the study was begun with.
    """

    name: str
    result: Result
    trials: Sequence[Trial]
    importances: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, str]

    def volumes(self) -> list[tuple[int, float, float]]:
        """(trial, hypervolume of the plans within the limits, hypervolume of all) after every trial that found a plan.

        Both only grow. The last of the first kind is what a search shows while it runs; where no plan keeps the limits
        that is the last of the second kind.
        """
        found, kept, all_of_them = [], Grown(self.result), Grown(self.result)
        for entry in sorted((e for e in self.result.entries if e.trial >= 0), key=lambda e: e.trial):
            if entry.feasible:
                kept.add(entry)
            all_of_them.add(entry)
            found.append((entry.trial, kept.volume, all_of_them.volume))
        return found


def read_history(url: str, name: str, limits: Sequence[Limit] | None = None) -> History:
    """Read a study from storage, judged by these limits (its own when None).

    Raises:
        InputError: there is no such study.
    """
    study = read_study(url, name)
    result = result_of(study, limits)
    return History(name, result, _trials(study, result), _importances(study, result), study.user_attrs.get(FACTS, {}))


def _trials(study: optuna.Study, result: Result) -> list[Trial]:
    again = study.user_attrs.get(CONFIRMED, {})
    return [_trial(t, result, again) for t in study.get_trials(deepcopy=False)]


def _trial(frozen: FrozenTrial, result: Result, again: Mapping[str, Any]) -> Trial:
    attributes = frozen.user_attrs
    plan = None
    if PLAN in attributes:
        plan = Plan.from_dict(attributes[PLAN], f"trial {frozen.number}")
    values: dict[str, float | None] = dict(attributes.get(VALUES) or {})
    if values and plan is not None:
        values |= again.get(plan.digest, {})
    feasible = None
    if values:
        known = {k: v for k, v in values.items() if v is not None}
        feasible = all(li.violation(known, result.dense) <= 0 for li in result.limits)
    predicted = attributes.get("predicted_kl")
    return Trial(
        frozen.number,
        _STATES[frozen.state],
        dict(frozen.params),
        values,
        plan,
        feasible,
        predicted if isinstance(predicted, int | float) and math.isfinite(predicted) else None,
        attributes.get("same_as"),
        attributes.get(REASON),
        attributes.get(NOTES) or {},
        frozen.datetime_start,
        None if frozen.duration is None else frozen.duration.total_seconds(),
        attributes.get(ENVIRONMENT) or {},
    )


def _importances(study: optuna.Study, result: Result) -> dict[str, dict[str, float]]:
    """By PED-ANOVA (Watanabe, Bansal, Hutter 2023): by how much good trials proposed other numbers than all did."""
    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.params and t.values]
    if len(done) < FEWEST:
        return {}
    told = optuna.create_study(directions=study.directions)  # without plans that no parameters can tell
    told.add_trials(done)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, _GOOD / len(done))))
    found = {}
    for number, name in [(None, FRONT), *enumerate(result.objectives)]:
        sign = -1.0 if name in MAXIMIZED else 1.0
        target = None if number is None else lambda t, n=number, s=sign: s * t.values[n]
        if number is not None and len({t.values[number] for t in done}) < 2:
            continue  # nothing to tell good from bad by
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it repeats that low is taken for good, and that some trials are few
            shares = get_param_importances(told, evaluator=evaluator, target=target)
        if len(set(shares.values())) > 1:
            found[name] = dict(shares)
    return found
