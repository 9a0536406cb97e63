"""`Target`: where latency is measured. One file a target: its options, `conditions`, and how a model is run on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rankopt.errors import InputError, RankoptError
from rankopt.machine import device_lock
from rankopt.measurement import Measurement
from rankopt.timing import Effort, Timed, measured
from rankopt.yaml_file import Strict

if TYPE_CHECKING:
    from torch import nn


@dataclass(eq=False)
class Subject:
    """A module to be measured, and what it is called with.

    Attributes:
        module: in eval mode; it is not changed.
        args, kwargs: of the call.
        key: what it is recorded under; two subjects of one key take the same time.
        onnx: the module as an ONNX file, once it was exported; see `rankopt.onnx_file`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    onnx: bytes | None = field(default=None, repr=False)


class Target(Strict, ABC):
    """A place where models are measured. Its fields are the options that a study file may give.

    Attributes:
        label: what limits and tables call it, ``latency@LABEL<=4ms``; its name where none is given.
        batch: the batch size of what is measured (None: that of the example input).
        neighbours: whether single layers are measured between pointwise ones, see `LatencyTable`.
    """

    name: ClassVar[str]
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    batch: int | None = Field(None, ge=1)
    neighbours: bool = False

    @property
    def called(self) -> str:
        """The label, or the name."""
        return self.label or self.name

    @property
    def from_onnx(self) -> bool:
        """Whether an exported ONNX file and the inputs are all that it needs of a module."""
        return False

    @property
    def elsewhere(self) -> bool:
        """Whether it is another machine, which is not disturbed by what this one does meanwhile."""
        return False

    @property
    def node(self) -> str | None:
        """Where something was measured last, of a target that is `elsewhere`."""
        return None

    def unwanted(self, so: bool) -> None:
        """Whether a measurement that another thread has under way is to be given up; a target may do so."""

    @abstractmethod
    def conditions(self) -> dict[str, str]:
        """All that a time depends on besides the model and its input, as texts; raises `InputError` when the target
        is not there (a package or a device is missing), saying what to install."""

    @abstractmethod
    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        """Latency of each, interleaved, in ms; ratios are to the first.

        Raises:
            InputError: a module can't be run there; says which and why.
        """

    def peak_memory(self, subject: Subject) -> Measurement:
        """Peak memory of inference in MiB, measured in a process of its own; see `rankopt.peak_memory`."""
        raise InputError(f"target {self.called}: memory is not measured there; limit it on torch or onnxruntime")

    def for_layers(self) -> Target:
        """What single layers are measured on. Another target where this one takes too long to prepare a module."""
        return self


class LocalTarget(Target):
    """A target on this machine: what is left to say is how a module becomes something that can be timed."""

    threads: int = Field(1, ge=1, le=1024)

    @property
    def device(self) -> str:
        """What is locked while it is measured."""
        return "cpu"

    @abstractmethod
    def prepare(self, subjects: Sequence[Subject]) -> list[Timed]:
        """Make them ready to run."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """The state in which they are prepared and run."""
        yield

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        """See `Target.measure`. Nothing else is measured on the device meanwhile."""
        if not subjects:
            return []
        conditions = self.conditions()
        with self.running():
            try:
                runs = self.prepare(subjects)
            except RankoptError:
                raise
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise InputError(f"target {self.called}: can't run it: {type(error).__name__}: {first}") from error
            with device_lock(self.device):
                return measured(runs, conditions, effort)
