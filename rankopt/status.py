"""`read_status`: how far a study is, what runs, what failed and why; read from storage while others write to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from rankopt.errors import RankoptError
from rankopt.heartbeat import BEAT, WORKER, seems_alive
from rankopt.ledger import INTERRUPTED, PLAN, REASON, WANTED, counts, read_study, result_of
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.storages import writer_of
from rankopt.trials import spent
from rankopt.worth import Gains, volume

_RECENT = 20  # trials that the rate is taken over


@dataclass(frozen=True)
class Running:
    """A trial that was begun and has not ended.

    Attributes:
        trial: its number.
        host, pid: of the driver that began it.
        seconds: since it was begun.
        heard_of: seconds since its time was renewed last (None: it carries none).
        alive: whether its driver lives, as far as can be told from here; if not, the plan is run again.
        died: why its worker died before and it was begun again.
    """

    trial: int
    host: str
    pid: int | None
    seconds: float
    heard_of: float | None
    alive: bool
    died: Sequence[str] = ()


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        name: of the study.
        done: trials that count: complete, stopped and failed ones.
        complete: trials that were measured to the end.
        stopped: why trials were ended early → how many.
        failed: trial → why it has no measurements.
        running: what is under way.
        interrupted: trials whose process ended before they did.
        again: how many interrupted plans are still to be run again.
        seconds: in which somebody was at work on trials.
        per_minute: trials, over the last of them (None: fewer than two).
        best: what the best plan within the limits measured, and its trial (None: none keeps them).
        hypervolume: of the front.
        without_gain: how many trials there were since the front grew last.
        limits: that the best plan keeps.
        wanted: how far the study is to go: ``trials``, and ``time_limit`` in seconds and ``patience`` or None.
        writer: the process that holds the storage, where that is a file.
    """

    name: str
    done: int
    complete: int
    stopped: Mapping[str, int]
    failed: Mapping[int, str]
    running: Sequence[Running]
    interrupted: int
    again: int
    seconds: float
    per_minute: float | None
    best: Mapping[str, float | None] | None
    best_trial: int | None
    hypervolume: float
    without_gain: int
    limits: Sequence[str] = field(default_factory=tuple)
    wanted: Mapping[str, Any] = field(default_factory=dict)
    writer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> list[tuple[str, int | None]]:
        """(host, process) of the drivers that live: those that run a trial, and who writes to a storage in a file."""
        writer = [(str(self.writer["host"]), int(self.writer["pid"]))] if self.writer else []
        return list(dict.fromkeys([*((r.host, r.pid) for r in self.running if r.alive), *writer]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        workers = [{"host": host, "pid": pid} for host, pid in self.workers]
        told = {k: v for k, v in asdict(self).items() if k != "writer"}
        return told | {"failed": {str(k): v for k, v in self.failed.items()}, "workers": workers}


def read_status(url: str, name: str, limits: Sequence[Limit] | None = None) -> Status:
    """Read a study from storage, judged by these limits (its own when None); raises `InputError` if there is none."""
    study = read_study(url, name)
    result = result_of(study, limits)
    trials = study.get_trials(deepcopy=False)
    counted = [t for t in trials if counts(t)]
    cut_off = [t for t in trials if t.state.is_finished() and not counts(t)]
    gains, entries = Gains(replace(result, entries=[])), {e.trial: e for e in result.entries}
    for trial in counted:
        gains.add(entries.get(trial.number))
    try:
        best = result.best()
    except RankoptError:
        best = None
    return Status(
        name=name,
        done=len(counted),
        complete=sum(t.state == TrialState.COMPLETE for t in counted),
        stopped=dict(Counter(_reason(t) for t in counted if t.state == TrialState.PRUNED)),
        failed={t.number: _reason(t) for t in counted if t.state == TrialState.FAIL},
        running=[_running(t) for t in trials if t.state == TrialState.RUNNING],
        interrupted=len(cut_off),
        again=_to_be_run_again(trials, cut_off),
        seconds=spent(trials),
        per_minute=_rate(counted),
        best=None if best is None else dict(best.measurements),
        best_trial=None if best is None else best.trial,
        hypervolume=volume(result),
        without_gain=gains.without,
        limits=tuple(map(str, result.limits)),
        wanted=study.user_attrs.get(WANTED, {}),
        writer=writer_of(url),
    )


def _reason(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(REASON, "no reason was recorded"))


def _running(trial: FrozenTrial) -> Running:
    worker, beat = trial.user_attrs.get(WORKER, {}), trial.user_attrs.get(BEAT)
    begun = trial.datetime_start or datetime.now()
    return Running(
        trial.number,
        str(worker.get("host", "an unknown machine")),
        worker.get("pid"),
        max(0.0, (datetime.now() - begun).total_seconds()),
        None if beat is None else max(0.0, time.time() - beat),
        seems_alive(trial),
        tuple(trial.user_attrs.get("died", ())),
    )


def _to_be_run_again(trials: Sequence[FrozenTrial], cut_off: Sequence[FrozenTrial]) -> int:
    def digests(some: Sequence[FrozenTrial]) -> set[str]:
        return {Plan.from_dict(t.user_attrs[PLAN]).digest for t in some if PLAN in t.user_attrs}

    if not cut_off:
        return 0
    return len(digests(cut_off) - digests([t for t in trials if t.user_attrs.get(REASON) != INTERRUPTED]))


def _rate(counted: Sequence[FrozenTrial]) -> float | None:
    """Trials a minute over the last of them, pauses left out."""
    last = sorted((t for t in counted if t.datetime_start), key=lambda t: t.datetime_complete or datetime.min)[
        -_RECENT:
    ]
    seconds = spent(last)
    return 60 * len(last) / seconds if len(last) > 1 and seconds > 0 else None
