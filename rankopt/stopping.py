"""`Stopping`: when a study ends besides having all its trials, after some time or when nothing is gained any more."""

from __future__ import annotations

from dataclasses import dataclass


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
