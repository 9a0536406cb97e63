"""``replay``: latencies from a recorded table, or made up from a model's size. Nothing is timed.

A table serves to repeat a search without the device. What is made up is a model of a device and no measurement: a time
for every million multiply-accumulates and one for every module that is called. It is the same on every machine, so it
serves tests and dry runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from rankopt.errors import InputError, UncountedOperationError
from rankopt.latency_store import LatencyStore
from rankopt.measurement import Measurement
from rankopt.targets.target import Subject, Target
from rankopt.targets.torch_cpu import first_line
from rankopt.timing import Effort

_SHORTEST = 1e-6  # ms, where there is nothing to compute


class Replay(Target):
    """A recorded device, or one that is made up.

    Attributes:
        table: the path of a recorded latency table; see `rankopt.latency_store`.
        ms_per_mmac: for what is not in the table: milliseconds for a million multiply-accumulates.
        ms_per_module: likewise, for every call of a module without children, such as a layer or an activation.
    """

    name: ClassVar[str] = "replay"
    table: str | None = None
    ms_per_mmac: float | None = Field(None, ge=0, allow_inf_nan=False)
    ms_per_module: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_a_source(self) -> Replay:
        if self.table is None and not self._makes_up:
            raise ValueError("needs table, ms_per_mmac or ms_per_module")
        return self

    def conditions(self) -> dict[str, str]:
        """The table's; what times are made up of is added, because they are not to be mixed with measured ones."""
        found = {"target": self.name, **(self._table().conditions if self.table else {})}
        given = {"ms_per_mmac": self.ms_per_mmac, "ms_per_module": self.ms_per_module}
        return found | {k: str(v) for k, v in given.items() if v is not None}

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        """The recorded measurements of these keys, as ratios to the first too; `effort` is not used.

        Raises:
            InputError: a key is not in the table, and no time can be made up.
        """
        conditions = self.conditions()
        table = self._table() if self.table else None
        found = [replace(self._one(s, table), conditions=conditions) for s in subjects]
        return [_beside(m, found[0]) for m in found]

    @property
    def _makes_up(self) -> bool:
        return self.ms_per_mmac is not None or self.ms_per_module is not None

    def _table(self) -> LatencyStore:
        path = Path(self.table or "")
        try:
            state = path.stat()
        except OSError as error:
            raise InputError(f"target {self.called}: {path}: can't be read: {error.strerror}") from None
        return _read(path, state.st_mtime_ns, state.st_size)

    def _one(self, subject: Subject, table: LatencyStore | None) -> Measurement:
        recorded = table.get(subject.key) if table else None
        if recorded is not None:
            if recorded.unit != "ms":
                raise InputError(f"target {self.called}: {self.table}: {subject.key!r} is in {recorded.unit}, not ms")
            return recorded
        if not self._makes_up:
            raise InputError(
                f"target {self.called}: {self.table} holds nothing under {subject.key!r}; "
                "record it, or give ms_per_mmac to have it made up"
            )
        macs, calls = self._size(subject)
        time = max(_SHORTEST, (self.ms_per_mmac or 0) * macs / 1e6 + (self.ms_per_module or 0) * calls)
        return Measurement(time, "ms", 1, time, time, time, 0.0)

    def _size(self, subject: Subject) -> tuple[int, int]:
        """MACs, and how many calls of modules without children there are, by running it once."""
        from rankopt.cost import count

        calls = 0

        def called(*_: object) -> None:
            nonlocal calls
            calls += 1

        leaves = [m for m in subject.module.modules() if next(m.children(), None) is None]
        hooks = [leaf.register_forward_hook(called) for leaf in leaves]
        try:
            return count(subject.module, subject.args, subject.kwargs).macs, calls
        except InputError:
            raise
        except UncountedOperationError as error:
            raise InputError(f"target {self.called}: no time can be made up: {error.message}") from error
        except Exception as error:
            raise InputError(f"target {self.called}: the model can't be run: {first_line(error)}") from error
        finally:
            for hook in hooks:
                hook.remove()


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> LatencyStore:
    """The table as it was then."""
    return LatencyStore.read(path)


def _beside(found: Measurement, first: Measurement) -> Measurement:
    """With its ratios to the first, which are as sure as the recorded values: nothing is known of their error."""
    kept = found.value / first.value
    return replace(found, kept=kept, kept_low=kept, kept_high=kept, kept_error=0.0, p95_kept=found.p95 / first.p95)
