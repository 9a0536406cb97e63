"""Every error that rankopt raises on purpose.

::

    RankoptError
    ├── InputError                 something given is wrong; the command line exits with status 2
    │   ├── LayerError             a layer, a decomposition or a rank that does not fit it
    │   ├── PlanError              a plan that is malformed, or made for another model
    │   ├── LimitError             a limit that can't be read
    │   ├── StudyFileError         a study or search-space file; names the key
    │   ├── StudyMismatchError     a study opened again with something else than it was begun with
    │   ├── ConditionsError        times measured under different conditions would be mixed
    │   ├── DataError              batches, labels or outputs of the wrong form
    │   ├── ArtifactError          a directory that does not hold what it should
    │   └── KilledError            a process of its own that measured something was killed; it may be tried again
    ├── InfeasibleError            no plan meets the limits; says what is reachable
    ├── RefusedDecomposition       this layer at this rank: the result would be bad (not an input error of the user's)
    ├── TrainingError              a fine-tuning that does not stay finite
    └── UncountedOperationError    the model runs an operation that no counter counts

A message says where, what was needed, what was given and what to do, on one line.
"""

from __future__ import annotations


class RankoptError(Exception):
    """Base of all errors raised on purpose."""

    @property
    def message(self) -> str:
        """The text on one line."""
        return " ".join(str(self).split())


class InputError(RankoptError, ValueError):
    """Something given by the user is wrong."""


class LayerError(InputError):
    """A layer, method or rank that does not fit."""


class PlanError(InputError):
    """A plan that is malformed or does not belong to this model."""


class LimitError(InputError):
    """A limit that can't be read."""


class StudyFileError(InputError):
    """A study file or search space that can't be used; names the key."""


class StudyMismatchError(InputError):
    """A stored study that was begun with another model, data, space or other objectives."""


class ConditionsError(InputError):
    """Measurements of different devices, runtimes or settings would be mixed; names what differs."""


class DataError(InputError):
    """Batches, labels or model outputs of an unexpected form."""


class ArtifactError(InputError):
    """A saved model directory that is incomplete, damaged or not what it says."""


class KilledError(InputError):
    """A process that measured something was killed, by the system for its memory or by somebody."""


class InfeasibleError(RankoptError):
    """No plan meets the limits; `reachable` maps each limited quantity to the smallest value a plan can have."""

    def __init__(self, text: str, reachable: dict[str, float] | None = None) -> None:
        super().__init__(text)
        self.reachable = reachable or {}


class RefusedDecomposition(RankoptError):
    """The decomposition exists but is numerically bad here, so it is not offered."""


class TrainingError(RankoptError):
    """A fine-tuning whose loss, gradients or weights become infinite again and again."""


class UncountedOperationError(RankoptError):
    """An operation with arithmetic in it that no counter knows."""


def reason_of(error: BaseException) -> str:
    """What an error says, on one line."""
    return error.message if isinstance(error, RankoptError) else " ".join(f"{type(error).__name__}: {error}".split())
