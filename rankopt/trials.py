"""`Trials`: the trials of a study as its storage holds them; this driver's own, and those of others beside it.

A trial that runs while its worker is dead is failed as interrupted (swept), and its plan is to be run again. Where one
process writes at a time every other worker is dead; where several do, their heartbeats tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from rankopt.heartbeat import BEAT, WORKER, Heartbeat, Liveness
from rankopt.ledger import ENVIRONMENT, INTERRUPTED, KILLED, PLAN, PROPOSAL, REASON, begin, counts, finish, written
from rankopt.machine import here
from rankopt.plan import Plan
from rankopt.space import SearchSpace
from rankopt.storages import alone, shared
from rankopt.strategies.strategy import Proposal

_MOST_KILLS = 3


class Trials:
    """See above. For one thread; `alone` has to be held around `news` and what is decided by it.

    Args:
        study: from `ledger.open_study`.
        space: what plans are out of.
        seed: of the study, for the record.

    Attributes:
        others: trial → digest of its plan, of the trials that run elsewhere.
        given_up: digests of plans that have killed their process too often.
    """

    def __init__(self, study: optuna.Study, space: SearchSpace, seed: int) -> None:
        self.study, self.space = study, space
        self.shared = shared(study._storage)
        self.others: dict[int, str] = {}
        self.given_up: set[str] = set()
        self._own: dict[int, str] = {}
        self._told: set[int] = set()
        self._cut_off: dict[str, Proposal] = {}
        self._ended: set[str] | None = None  # plans that need not be run again; read when one may have to be
        self._liveness = Liveness()
        self._heartbeat = Heartbeat(study._storage)
        self._environment = {"seed": seed, **here()}

    def alone(self) -> AbstractContextManager[None]:
        """Hold off other drivers of the study."""
        return alone(self.study._storage, self.study.study_name)

    def news(self) -> list[FrozenTrial]:
        """Trials that ended since the last call and count, without those that were ended here; all of them at first."""
        if self._told and not self.shared:
            return []  # nobody else writes
        found = []
        frozen = {t.number: t for t in self.study.get_trials(deepcopy=False)}
        for trial in list(frozen.values()):
            if trial.number in self._told or trial.number in self._own or trial.state == TrialState.WAITING:
                continue
            if not trial.state.is_finished():
                if self.shared and self._liveness.alive(trial):
                    self.others[trial.number] = self.others.get(trial.number) or _digest(trial)
                    continue
                trial = self._swept(trial, frozen.values())
            self.others.pop(trial.number, None)
            self._told.add(trial.number)
            self._note(trial)
            frozen[trial.number] = trial
            if counts(trial):
                found.append(trial)
        if self._cut_off and self._ended is None:
            self._ended = {_digest(t) for t in frozen.values() if counts(t)}
        return found

    def begin(self, proposal: Proposal) -> optuna.Trial:
        """Write down a new running trial."""
        besides = {**self._heartbeat.attributes(), ENVIRONMENT: self._environment}
        trial = begin(self.study, self.space, proposal.plan, proposal.to_dict(), besides)
        self._own[trial.number] = proposal.plan.digest
        self._heartbeat.add(trial._trial_id)
        return trial

    def add(self, made: FrozenTrial) -> FrozenTrial:
        """Write down a finished trial; gives it as it stands in the storage."""
        with written():
            storage = self.study._storage
            trial = storage.get_trial(storage.create_new_trial(self.study._study_id, template_trial=made))
        self._told.add(trial.number)
        return trial

    def end(
        self,
        trial: optuna.Trial,
        state: TrialState,
        attributes: Mapping[str, Any],
        constraints: Mapping[str, float] | None = None,
        values: Sequence[float] | None = None,
    ) -> bool:
        """Write down what became of a trial; False if another driver had swept it, which then stays so."""
        self._heartbeat.remove(trial._trial_id)
        digest = self._own.pop(trial.number)
        try:
            finish(self.study, trial._trial_id, state, attributes, constraints, values)
        except UpdateFinishedTrialError:
            return False
        self._told.add(trial.number)
        if self._ended is not None and attributes.get(REASON) != INTERRUPTED:
            self._ended.add(digest)
        return True

    def under_way(self) -> frozenset[str]:
        """Digests of the plans that are being measured, here and elsewhere."""
        return frozenset([*self._own.values(), *self.others.values()])

    def cut_off(self) -> list[Proposal]:
        """What was interrupted and is neither under way again nor was it run since, in the order of trials."""
        busy = self.under_way()
        return [p for digest, p in self._cut_off.items() if digest not in busy and digest not in (self._ended or ())]

    def close(self) -> None:
        """This driver runs nothing any more."""
        self._heartbeat.close()

    def _note(self, trial: FrozenTrial) -> None:
        if PLAN not in trial.user_attrs:
            return
        if KILLED in trial.user_attrs and counts(trial):
            self.given_up.add(trial.user_attrs[KILLED])
        if not counts(trial):
            proposal = proposal_of(trial)
            self._cut_off.setdefault(proposal.plan.digest, proposal)
        elif self._ended is not None:
            self._ended.add(_digest(trial))

    def _swept(self, trial: FrozenTrial, all_trials: Iterable[FrozenTrial]) -> FrozenTrial:
        """Fail a trial whose worker is dead. One whose plan has killed its process several times is not run again."""
        digest = _digest(trial)
        kills = 1 + sum(t.user_attrs.get(KILLED) == digest for t in all_trials if digest)
        reason = f"its process was killed, {kills} times; out of memory?" if kills >= _MOST_KILLS else INTERRUPTED
        with suppress(UpdateFinishedTrialError):  # it has just ended, or was swept elsewhere
            finish(self.study, trial._trial_id, TrialState.FAIL, {REASON: reason, KILLED: digest})
        return self.study._storage.get_trial(trial._trial_id)


def proposal_of(trial: FrozenTrial) -> Proposal:
    """How the plan of a trial came about."""
    plan = Plan.from_dict(trial.user_attrs[PLAN], f"trial {trial.number}")
    return Proposal.from_dict(plan, trial.user_attrs.get(PROPOSAL, {}))


def _digest(trial: FrozenTrial) -> str:
    return Plan.from_dict(trial.user_attrs[PLAN], f"trial {trial.number}").digest if PLAN in trial.user_attrs else ""


def spent(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which somebody was at work on these trials: a driver is from the beginning of its first one to the end
    of its last one. One that was interrupted ran until its time was renewed last."""
    spans: dict[Any, tuple[datetime, datetime]] = {}
    for trial in trials:
        if trial.datetime_start is not None:
            driver = trial.user_attrs.get(WORKER, {}).get("id", trial.number)
            start, end = spans.get(driver, (datetime.max, datetime.min))
            spans[driver] = (min(start, trial.datetime_start), max(end, _end(trial)))
    total, until = 0.0, datetime.min
    for start, end in sorted(spans.values()):
        if end > until:
            total += (end - max(start, until)).total_seconds()
            until = end
    return total


def _end(trial: FrozenTrial) -> datetime:
    start = trial.datetime_start or datetime.min
    if trial.datetime_complete is not None and trial.user_attrs.get(REASON) != INTERRUPTED:
        return trial.datetime_complete
    beat = trial.user_attrs.get(BEAT)
    return max(start, datetime.fromtimestamp(beat)) if isinstance(beat, int | float) else start
