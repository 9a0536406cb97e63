"""`Loop`: ask and tell. Which plan is measured next, and what becomes of what was measured.

Any number of trials may have been asked for and not been told yet, here and by other drivers of the same study. Their
plans are not proposed again, and they count. What was interrupted is run again, before anything new.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from rankopt.begun import FACTS
from rankopt.errors import InfeasibleError, KilledError, RankoptError, reason_of
from rankopt.evaluate import Evaluate, Evaluation
from rankopt.interrupts import uninterrupted
from rankopt.ledger import (
    ENVIRONMENT,
    EXCESS,
    INTERRUPTED,
    NOTES,
    PLAN,
    PLAN_DIGEST,
    REASON,
    VALUES,
    entries_of,
    gathered,
    known_entries,
)
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.result import Entry, Progress
from rankopt.sampling import Told
from rankopt.stopping import Stopping
from rankopt.strategies import strategy_for
from rankopt.strategies.strategy import Exhausted, Proposal, Setting, Standing
from rankopt.trials import Trials, proposal_of, spent
from rankopt.worth import Gains, excess_over, signed, told_values, worth

_MAX_FAILURES, _MOST_RETRIES = 8, 2
_OTHER_TRIES = 8  # proposals after one whose plan is being measured
_POLL_S = 0.2
_FAR = "not measured on the device: another plan is better in everything"


@dataclass(frozen=True)
class Asked:
    """A trial that was begun: its plan is to be measured, unless that is known already.

    Attributes:
        trial: in the study's storage, running.
        proposal: its plan, and how it came about.
        known: the trial that measured the same plan before.
        died: why it had to be begun again, for every time.
    """

    trial: optuna.Trial
    proposal: Proposal
    known: Entry | None = None
    died: tuple[str, ...] = ()


class Loop:
    """The two halves of a trial, `ask` and `tell`, and what a study knows in between. For one thread.

    Args:
        study, setting, by, stopping: as for `study.run`.

    Attributes:
        done: how many trials the study has that were not interrupted.
        pending: trial → what was asked for here and not told yet.
        measured: plan digest → entry, of all plans that were measured to the end.
        stopped: why no more trials are asked for though there are not all; else empty.
    """

    def __init__(
        self,
        study: optuna.Study,
        setting: Setting,
        by: str = "auto",
        stopping: Stopping = Stopping(),  # noqa: B008
    ) -> None:
        self.study, self.setting, self.space, self.stopping = study, setting, setting.space, stopping
        self.objectives = tuple(study.user_attrs[FACTS]["objectives"].split(", "))
        self.pending: dict[int, Asked] = {}
        self.trials = Trials(study, setting.space, setting.seed)
        self.strategy = strategy_for(by, setting)
        with self.trials.alone():
            past = self.trials.news()
        known = known_entries(study, setting.limits)
        self.measured = {e.plan.digest: e for e in known if None not in told_values(e.measurements, self.objectives)}
        self._refused = {t.user_attrs[PLAN_DIGEST] for t in past if PLAN_DIGEST in t.user_attrs}
        self.done = len(past)
        self.strategy.recall([pair for t in past if (pair := self._past(t)) is not None])
        self._empty = gathered(study, setting.limits, [])
        self._gains, self._best = Gains(self._empty), list[Entry]()
        with suppress(InfeasibleError):
            self._best = [self._empty.best()]  # the dense model, where it is an entry
        measured = {e.trial: e for e in self.measured.values()}
        for trial in past:
            self._grow(measured.get(trial.number))
        self._spent = 0.0 if stopping.time_limit is None else spent(study.get_trials(deepcopy=False))
        self._failures: list[str] = []
        self._exhausted = False
        self.stopped = ""
        self._last: Entry | None = None
        self._start = time.perf_counter()

    # what an executor needs ------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether nothing is under way here and no trial will be asked for any more."""
        return not self.pending and (self.done >= self.setting.trials or self._exhausted or bool(self.stopped))

    @property
    def drained(self) -> bool:
        """Whether no new plan will be asked for; what is under way may have to be begun again."""
        return self.asked >= self.setting.trials or self._exhausted or bool(self.stopped)

    def ask(self) -> Asked | None:
        """Begin the next trial; None when there is none to begin as things stand (see `finished`).

        Raises:
            RankoptError: too many trials failed in a row.
        """
        if len(self._failures) >= _MAX_FAILURES:
            raise RankoptError(f"{len(self._failures)} trials failed in a row; the last: {self._failures[-1]}")
        with self.trials.alone():
            for trial in self.trials.news():
                self.take(trial)
            seconds = self._spent + time.perf_counter() - self._start
            self.stopped = self.stopped or self.stopping.why(seconds, self._gains.without)
            if self.asked >= self.setting.trials or self._exhausted or self.stopped:
                return None
            try:
                proposal = self._next()
            except Exhausted:
                if self.asked == 0:
                    raise
                self._exhausted = not self.trials.under_way()  # what is under way may lead to others
                return None
            if proposal is None:
                self._exhausted = not self.trials.under_way()
                return None
            with uninterrupted():  # what is written down as running is known here, for `interrupt`
                begun = self.trials.begin(proposal)
                asked = self.pending[begun.number] = Asked(begun, proposal, self.measured.get(proposal.plan.digest))
        return asked

    def limits_of(self, asked: Asked) -> Sequence[Limit]:
        """What the plan is judged by while it is measured."""
        return () if asked.proposal.probe else self.setting.limits

    def worth(self, known: Mapping[str, float]) -> bool:
        """Whether a plan of which this is known is worth measuring on a device, as things stand."""
        return worth(known, list(self.measured.values()), self.objectives, self.setting.limits, self.setting.dense)

    def recalled(self, asked: Asked) -> Evaluation | None:
        """What an earlier trial of the study measured of the same plan."""
        if asked.known is None:
            return None
        values = {k: v for k, v in asked.known.measurements.items() if v is not None}
        return Evaluation(values, {}, None, dict(asked.known.notes))

    def outcome(self, asked: Asked, evaluate: Evaluate) -> Evaluation | str:
        """Measure the plan of a trial here and now, or say why it could not be.

        Raises:
            KilledError: a process that measured was killed; see `retry`.
        """
        try:
            return self.recalled(asked) or evaluate(asked.proposal.plan, self.limits_of(asked), self.worth)
        except KilledError:
            raise
        except Exception as error:
            return reason_of(error)

    def tell(self, asked: Asked, outcome: Evaluation | str, ran: Mapping[str, str] | None = None) -> None:
        """Record what became of a trial, or why it failed, and let the strategy learn from it.

        Measurements with NaN or infinity among the objectives are a failure. A trial that another driver has taken for
        dead meanwhile stays so: its plan is run again elsewhere, and what comes here is dropped.

        Args:
            asked: from `ask`.
            outcome: what was measured, or one line.
            ran: the machine and versions where it was measured, if not here (see `machine.here`).
        """
        self._last = None
        if not isinstance(outcome, str):
            values = told_values(outcome.measurements, self.objectives)
            if any(v is not None and not np.isfinite(v) for v in values):
                outcome = f"measured {dict(zip(self.objectives, values, strict=True))}"
        where = {ENVIRONMENT: {"seed": self.setting.seed, **ran}} if ran else {}
        if isinstance(outcome, str):
            self._fail(asked, outcome, where)
        else:
            self._record(asked, outcome, where)

    def retry(self, asked: Asked, why: str) -> Asked | None:
        """Begin a trial again whose worker died; None when it died too often, and the trial is told as failed.

        The trial stays the same, and running. `why` is one line.
        """
        asked = replace(asked, died=(*asked.died, why))
        if len(asked.died) > _MOST_RETRIES:
            self.tell(asked, f"its worker died {len(asked.died)} times: {why}")
            return None
        with suppress(UpdateFinishedTrialError):  # another driver took it for dead; `tell` will see
            asked.trial.set_user_attr("died", list(asked.died))
        self.pending[asked.trial.number] = asked
        return asked

    def interrupt(self) -> None:
        """Mark everything that is under way here as interrupted; it is run again when the study goes on."""
        for asked in list(self.pending.values()):
            self._end(asked, TrialState.FAIL, {REASON: INTERRUPTED})

    def wait(self) -> None:
        """Let other drivers go on for a moment."""
        time.sleep(_POLL_S)

    def close(self) -> None:
        """The end: what still runs here is run by nobody."""
        self.trials.close()

    @property
    def asked(self) -> int:
        """How many trials the study has, those under way included and interrupted ones not."""
        return self.done + len(self.pending) + len(self.trials.others)

    def _next(self) -> Proposal | None:
        """The next plan that nobody measures; None where the strategy proposes no other."""
        standing = Standing(self.asked, list(self.measured.values()), self.trials.under_way())
        again = self.trials.cut_off()
        if again and standing.pending:
            return again[0]
        for further in range(_OTHER_TRIES):
            try:
                proposal = self.strategy.propose(replace(standing, number=standing.number + further))
            except Exhausted:
                if again:
                    return again[0]
                raise
            if again and again[0].plan.digest != proposal.plan.digest:
                self.strategy.unused(proposal)
                return again[0]
            # A study that was interrupted goes on as it would have: asked again, the strategy proposes the same.
            if proposal.plan.digest in self.trials.given_up:
                self._failed(proposal)
            elif proposal.plan.digest in standing.pending:
                self.strategy.unused(proposal)
            else:
                return proposal
        return None

    def _failed(self, proposal: Proposal) -> None:
        self.strategy.told(proposal, Told(proposal.numbers, None, {}, proposal.marks))

    # outcomes --------------------------------------------------------------------------------------------------------

    def _end(self, asked: Asked, *how: Any) -> bool:
        with uninterrupted():  # see `ask`
            del self.pending[asked.trial.number]
            return self.trials.end(asked.trial, *how)

    def _fail(self, asked: Asked, why: str, ran: Mapping[str, Any]) -> None:
        if not self._end(asked, TrialState.FAIL, {**ran, REASON: why}):
            return
        self.done += 1
        self._grow(None)
        self._failures.append(f"trial {asked.trial.number}: {why}")
        self._failed(asked.proposal)

    def _record(self, asked: Asked, found: Evaluation, ran: Mapping[str, Any]) -> None:
        number, proposal = asked.trial.number, asked.proposal
        values = told_values(found.measurements, self.objectives)
        excess = excess_over(self.setting.limits, found.measurements, self.setting.dense)
        known = [v for v in values if v is not None]
        complete = len(known) == len(values)
        attributes = {**ran, VALUES: found.measurements, EXCESS: found.violations, NOTES: found.notes}
        if asked.known is not None:
            attributes["same_as"] = asked.known.trial
        if not complete:
            attributes[REASON] = f"stopped at the limit {found.stopped}" if found.stopped else _FAR
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        if not self._end(asked, state, attributes, excess, known if complete else None):
            return
        self.done += 1
        self._failures = []
        if complete:
            feasible = all(by <= 0 for by in excess.values())
            self._last = Entry(number, proposal.plan, found.measurements, feasible, found.notes)
            self.measured.setdefault(proposal.plan.digest, self._last)
        self._grow(self._last)
        self.strategy.told(proposal, Told(proposal.numbers, signed(values, self.objectives), excess, proposal.marks))

    # what others have done -------------------------------------------------------------------------------------------

    def wants(self, plan: Plan) -> bool:
        """Whether a plan of another study is still to be taken over."""
        return self.asked < self.setting.trials and plan.digest not in (*self.measured, *self._refused)

    def take(self, trial: FrozenTrial) -> None:
        """Count a finished trial that was not asked for here, and learn from it."""
        self.done += 1
        if PLAN_DIGEST in trial.user_attrs:
            self._refused.add(trial.user_attrs[PLAN_DIGEST])
        entries = entries_of([trial], self.setting.limits, self.setting.dense)
        entries = [e for e in entries if None not in told_values(e.measurements, self.objectives)]
        for entry in entries:
            self.measured.setdefault(entry.plan.digest, entry)
        self._grow(entries[0] if entries else None)
        if (pair := self._past(trial)) is not None:
            self.strategy.told(*pair)

    def _past(self, trial: FrozenTrial) -> tuple[Proposal, Told] | None:
        """A trial of an earlier run as the strategy has to hear of it."""
        if PLAN not in trial.user_attrs:
            return None
        proposal = proposal_of(trial)
        measured = trial.user_attrs.get(VALUES)
        if measured is None or trial.state == TrialState.FAIL:
            return proposal, Told(proposal.numbers, None, {}, proposal.marks)
        values = signed(told_values(measured, self.objectives), self.objectives)
        excess = excess_over(self.setting.limits, measured, self.setting.dense)
        return proposal, Told(proposal.numbers, values, excess, proposal.marks)

    def _grow(self, entry: Entry | None) -> None:
        """One trial more, and what it measured."""
        self._gains.add(entry)
        if entry is not None:
            with suppress(InfeasibleError):
                self._best = [replace(self._empty, entries=[*self._best, entry]).best()]

    def standing_at(self, text: str = "") -> Progress:
        """What a watcher is told."""
        seconds, trials = time.perf_counter() - self._start, self.setting.trials
        if text:
            return Progress(self.done, trials, seconds, text=text)
        best = self._best[0].measurements if self._best else None
        return Progress(self.done, trials, seconds, best, self._gains.volume, entry=self._last)
