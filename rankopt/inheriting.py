"""`inherit`: plans of another study as finished trials of this one, with their quality known."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from rankopt.errors import reason_of
from rankopt.evaluate import Evaluate
from rankopt.ledger import EXCESS, NOTES, PLAN, PLAN_DIGEST, PROPOSAL, REASON, VALUES, Judged, layer_parameters
from rankopt.loop import Loop
from rankopt.strategies.strategy import Proposal
from rankopt.worth import told_values


def inherit(loop: Loop, old: Judged, evaluate: Evaluate) -> None:
    """Add a plan of another study: its quality as it was, the rest measured.

    One that is predicted to break a limit is passed over, and one that can't be measured here is a failed trial.
    """
    try:
        found = evaluate(old.plan, loop.setting.limits, lambda known: True, old.quality)
    except Exception as error:
        failed = {PLAN: old.plan.to_dict(short=True), PLAN_DIGEST: old.plan.digest, REASON: reason_of(error)}
        _add(loop, old, optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=failed))
        return
    values = [v for v in told_values(found.measurements, loop.objectives) if v is not None]
    if len(values) < len(loop.objectives):
        return
    share = loop.space.share(found.measurements)
    numbers = {k: share if k == "budget" else v for k, v in old.numbers.items()}
    params, distributions = layer_parameters(loop.space, old.plan)
    attributes = {
        PLAN: old.plan.to_dict(short=True),
        PROPOSAL: Proposal(old.plan, "inherited", numbers).to_dict(),
        VALUES: found.measurements,
        EXCESS: found.violations,
        NOTES: {**found.notes, "inherited": 1.0},
        "predicted_kl": loop.space.predicted(old.plan),
    }
    made = optuna.trial.create_trial(values=values, params=params, distributions=distributions, user_attrs=attributes)
    _add(loop, old, made)


def _add(loop: Loop, old: Judged, made: FrozenTrial) -> None:
    """Write a finished trial, unless another driver was faster."""
    with loop.trials.alone():
        for trial in loop.trials.news():
            loop.take(trial)
        if loop.wants(old.plan):
            loop.take(loop.trials.add(made))
