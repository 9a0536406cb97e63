"""The loop: ask, evaluate, tell. Besides `ledger` and `sampling` the only file that imports Optuna."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from rankopt.errors import InfeasibleError, RankoptError
from rankopt.evaluate import Evaluation
from rankopt.ledger import (
    EXCESS,
    FACTS,
    NOTES,
    PLAN,
    PLAN_DIGEST,
    PROPOSAL,
    REASON,
    VALUES,
    Judged,
    begin,
    confirm,
    entries_of,
    gathered,
    known_entries,
    layer_parameters,
    result_of,
    writable,
)
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.result import MAXIMIZED, Entry, Progress
from rankopt.sampling import Told
from rankopt.strategies import strategy_for
from rankopt.strategies.strategy import Exhausted, Proposal, Setting, Standing
from rankopt.worth import told_values, volume, worth

_MAX_FAILURES = 8
_INTERRUPTED = "interrupted"
_FAR = "not measured on the device: another plan is better in everything"


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
    setting: Setting,
    evaluate: Evaluate,
    progress: Callable[[Progress], None] = lambda p: None,
    learn: Callable[[], None] = lambda: None,
    inherited: Sequence[Judged] = (),
    by: str = "auto",
) -> None:
    """Go on until the study has `setting.trials` trials that were not interrupted.

    Args:
        study: from `ledger.open_study`.
        setting: space, limits, seed, how many trials; see `Setting`.
        evaluate: measures a plan.
        progress: told after every trial.
        learn: called after every trial that was measured, e.g. to correct predicted costs.
        inherited: plans whose quality is known from another study; they come first, and only the rest is measured.
        by: the strategy that chooses plans; see `rankopt.strategies`.

    Raises:
        RankoptError: after 8 failures in a row, with the reasons.
        InputError: the storage can't be written.
    """
    with writable(study.study_name):
        loop = Loop(study, setting, by)
        for old in inherited:
            if loop.wants(old.plan):
                progress(loop.standing_at("measuring plans of an earlier study"))
                loop.inherit(old, evaluate)
                learn()
        while (asked := loop.ask()) is not None:
            loop.tell(asked, loop.outcome(asked, evaluate))
            learn()
            progress(loop.standing_at())


@dataclass(frozen=True)
class Asked:
    """A trial that was begun: its plan is to be measured, unless that is known already."""

    trial: optuna.Trial
    proposal: Proposal
    known: Entry | None = None


class Loop:
    """The two halves of a trial, `ask` and `tell`, and what a study knows in between.

    Args:
        study, setting, by: as for `run`.
    """

    def __init__(self, study: optuna.Study, setting: Setting, by: str = "auto") -> None:
        self.study, self.setting, self.space = study, setting, setting.space
        self.objectives = tuple(study.user_attrs[FACTS]["objectives"].split(", "))
        _sweep(study)
        self.strategy = strategy_for(by, setting)
        frozen = [t for t in study.get_trials(deepcopy=False) if _counts(t)]
        known = known_entries(study, setting.limits)
        self.measured = {e.plan.digest: e for e in known if None not in told_values(e.measurements, self.objectives)}
        self._refused = {t.user_attrs[PLAN_DIGEST] for t in frozen if PLAN_DIGEST in t.user_attrs}
        self.done = len(frozen)
        self.strategy.recall([pair for t in frozen if (pair := self._past(t)) is not None])
        self._failures: list[str] = []
        self._exhausted = False
        self._last: Entry | None = None
        self._start = time.perf_counter()

    def wants(self, plan: Plan) -> bool:
        """Whether a plan of another study is still to be taken over."""
        return self.done < self.setting.trials and plan.digest not in (*self.measured, *self._refused)

    def ask(self) -> Asked | None:
        """Begin the next trial; None when there are enough, or no plan is left to propose.

        Raises:
            RankoptError: too many trials failed in a row.
        """
        if len(self._failures) >= _MAX_FAILURES:
            raise RankoptError(f"{len(self._failures)} trials failed in a row; the last: {self._failures[-1]}")
        if self.done >= self.setting.trials or self._exhausted:
            return None
        try:
            proposal = self.strategy.propose(Standing(self.done, list(self.measured.values())))
        except Exhausted:
            if self.done == 0:
                raise
            self._exhausted = True
            return None
        trial = begin(self.study, self.space, proposal.plan, proposal.to_dict())
        return Asked(trial, proposal, self.measured.get(proposal.plan.digest))

    def outcome(self, asked: Asked, evaluate: Evaluate) -> Evaluation | str:
        """Measure the plan of a trial, or say why it could not be. An interrupted trial is recorded as such."""
        if asked.known is not None:
            values = {k: v for k, v in asked.known.measurements.items() if v is not None}
            return Evaluation(values, {}, None, dict(asked.known.notes))
        setting, entries = self.setting, list(self.measured.values())
        try:
            found = evaluate(
                asked.proposal.plan,
                () if asked.proposal.probe else setting.limits,
                lambda known: worth(known, entries, self.objectives, setting.limits, setting.dense),
            )
            told = told_values(found.measurements, self.objectives)
            if any(v is not None and not np.isfinite(v) for v in told):
                raise RankoptError(f"measured {dict(zip(self.objectives, told, strict=True))}")
            return found
        except KeyboardInterrupt:
            asked.trial.set_user_attr(REASON, _INTERRUPTED)
            self.study.tell(asked.trial, state=TrialState.FAIL)
            raise
        except Exception as error:
            return _reason(error)

    def tell(self, asked: Asked, outcome: Evaluation | str) -> None:
        """Record what became of a trial, or why it failed, and let the strategy learn from it."""
        trial, proposal, self._last = asked.trial, asked.proposal, None
        self.done += 1
        if isinstance(outcome, str):
            trial.set_user_attr(REASON, outcome)
            self.study.tell(trial, state=TrialState.FAIL)
            self._failures.append(f"trial {trial.number}: {outcome}")
            self.strategy.told(proposal, Told(proposal.numbers, None, {}, proposal.marks))
            return
        self._failures = []
        values = told_values(outcome.measurements, self.objectives)
        excess = self._excess(outcome.measurements)
        trial.set_user_attr(VALUES, outcome.measurements)
        trial.set_user_attr(EXCESS, outcome.violations)
        trial.set_user_attr(NOTES, outcome.notes)
        if asked.known is not None:
            trial.set_user_attr("same_as", asked.known.trial)
        for limit, by in excess.items():
            trial.set_constraint(limit, by)
        if any(v is None for v in values):
            trial.set_user_attr(REASON, f"stopped at the limit {outcome.stopped}" if outcome.stopped else _FAR)
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, [v for v in values if v is not None])
            feasible = all(by <= 0 for by in excess.values())
            self._last = Entry(trial.number, proposal.plan, outcome.measurements, feasible, outcome.notes)
            self.measured.setdefault(proposal.plan.digest, self._last)
        self.strategy.told(proposal, Told(proposal.numbers, self._minimized(values), excess, proposal.marks))

    def inherit(self, old: Judged, evaluate: Evaluate) -> None:
        """Add a plan of another study as a finished trial: its quality as it was, the rest measured.

        One that is predicted to break a limit is passed over.
        """
        try:
            found = evaluate(old.plan, self.setting.limits, lambda known: True, old.quality)
        except Exception as error:
            failed = {PLAN: old.plan.to_dict(), PLAN_DIGEST: old.plan.digest, REASON: _reason(error)}
            self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=failed))
            self._refused.add(old.plan.digest)
            self.done += 1
            return
        values = [v for v in told_values(found.measurements, self.objectives) if v is not None]
        if len(values) < len(self.objectives):
            return
        share = self.space.share(found.measurements)
        numbers = {k: share if k == "budget" else v for k, v in old.numbers.items()}
        proposal = Proposal(old.plan, "inherited", numbers)
        params, distributions = layer_parameters(self.space, old.plan)
        attributes = {
            PLAN: old.plan.to_dict(),
            PROPOSAL: proposal.to_dict(),
            VALUES: found.measurements,
            EXCESS: found.violations,
            NOTES: {**found.notes, "inherited": 1.0},
            "predicted_kl": self.space.predicted(old.plan),
        }
        self.study.add_trial(
            optuna.trial.create_trial(values=values, params=params, distributions=distributions, user_attrs=attributes)
        )
        frozen = self.study.get_trials(deepcopy=False)[-1]
        self.measured[old.plan.digest] = entries_of([frozen], self.setting.limits, self.setting.dense)[0]
        self.done += 1
        self.strategy.told(proposal, Told(numbers, self._minimized(values), self._excess(found.measurements)))

    def standing_at(self, text: str = "") -> Progress:
        """What a watcher is told."""
        seconds, trials = time.perf_counter() - self._start, self.setting.trials
        if text:
            return Progress(self.done, trials, seconds, text=text)
        result = gathered(self.study, self.setting.limits, self.measured.values())
        try:
            best: Mapping[str, float | None] | None = result.best().measurements
        except RankoptError:
            best = None
        return Progress(self.done, trials, seconds, best, volume(result), entry=self._last)

    def _past(self, trial: FrozenTrial) -> tuple[Proposal, Told] | None:
        """A trial of an earlier run as the strategy has to hear of it."""
        if PLAN not in trial.user_attrs:
            return None
        told = trial.user_attrs.get(PROPOSAL, {})
        plan = Plan.from_dict(trial.user_attrs[PLAN], f"trial {trial.number}")
        proposal = Proposal(plan, told.get("by", ""), told.get("numbers", {}), told.get("marks", {}))
        measured = trial.user_attrs.get(VALUES)
        if measured is None or trial.state == TrialState.FAIL:
            return proposal, Told(proposal.numbers, None, {}, proposal.marks)
        values = self._minimized(told_values(measured, self.objectives))
        return proposal, Told(proposal.numbers, values, self._excess(measured), proposal.marks)

    def _minimized(self, values: Sequence[float | None]) -> list[float | None]:
        signs = [-1.0 if o in MAXIMIZED else 1.0 for o in self.objectives]
        return [None if v is None else sign * v for sign, v in zip(signs, values, strict=True)]

    def _excess(self, measured: Mapping[str, float]) -> dict[str, float]:
        """How far beyond each limit; what was not measured is taken for kept by as much as it can be."""
        return {str(li): min(li.violation(measured, self.setting.dense), 1e6) for li in self.setting.limits}


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


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    return error.message if isinstance(error, RankoptError) else " ".join(f"{type(error).__name__}: {error}".split())


def _sweep(study: optuna.Study) -> None:
    """Trials that a killed process left running are failed, so that they repel no samples for ever."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, REASON, _INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)


def _counts(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and trial.user_attrs.get(REASON) != _INTERRUPTED
