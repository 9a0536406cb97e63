"""When a study ends besides having all its trials: after some time, or when nothing is gained any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from optuna.trial import FrozenTrial

from rankopt.heartbeat import BEAT
from rankopt.ledger import INTERRUPTED, REASON
from rankopt.result import Entry, Result
from rankopt.worth import Grown


@dataclass(frozen=True)
class Stopping:
    """What ends a study early.

    Attributes:
        time_limit: seconds in which trials may be begun, over all runs of the study together; what is under way by
            then is finished. Preparing does not count, nor the time between two runs.
        patience: trials in a row without a gain in the hypervolume of the front.
    """

    time_limit: float | None = None
    patience: int | None = None

    def why(self, seconds: float, without_gain: int) -> str:
        """Why to stop now; empty: go on."""
        if self.time_limit is not None and seconds >= self.time_limit:
            return f"stopped: the time limit of {self.time_limit:g} s is over"
        if self.patience is not None and without_gain >= self.patience:
            return f"stopped: no gain in hypervolume for {without_gain} trials"
        return ""


class Gains:
    """How many trials there were since the last one by which the front grew.

    As long as no plan keeps the limits it is the front of all plans, and afterwards that of those that do.
    """

    def __init__(self, empty: Result) -> None:
        self._all, self._kept = Grown(empty), Grown(empty)
        self.without = 0

    def add(self, entry: Entry | None) -> None:
        """The next trial, and what it measured if it did."""
        before = (self._kept.volume, 0.0 if self._kept.volume else self._all.volume)
        if entry is not None:
            self._all.add(entry)
            if entry.feasible:
                self._kept.add(entry)
        after = (self._kept.volume, 0.0 if self._kept.volume else self._all.volume)
        self.without = 0 if after > before else self.without + 1


def spent(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which at least one of these trials ran; one that was interrupted, until its time was renewed last."""
    spans = sorted((t.datetime_start, _end(t)) for t in trials if t.datetime_start is not None)
    total, until = 0.0, datetime.min
    for start, end in spans:
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
