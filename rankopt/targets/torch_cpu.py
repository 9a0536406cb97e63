"""``torch``: PyTorch on the CPU, operation by operation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.machine import cpu_conditions, keep_freed_memory
from rankopt.peak_memory import MemoryTarget
from rankopt.targets.target import Subject
from rankopt.timing import Timed, each

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MemoryFormat = Literal["contiguous", "channels_last"]
_PROGRAM = "model.pt2"
_PLACE = re.compile(r"(Exception from \S+|Check '.*' failed at \S+|backend=\S+ raised):?$")


class TorchCpu(MemoryTarget):
    """PyTorch on the CPU.

    Attributes:
        threads: of torch, within operations.
        dtype: what weights and floating inputs are converted to.
        memory_format: of four-dimensional weights and inputs.
    """

    name: ClassVar[str] = "torch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    memory_format: MemoryFormat = "contiguous"

    def conditions(self) -> dict[str, str]:
        """Machine, version, threads, dtype, memory format, and what becomes of freed memory where that is known."""
        import torch

        return {
            "target": self.name,
            **cpu_conditions(),
            "runtime": f"torch {torch.__version__}",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": str(self.threads),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            **({"freed memory": "kept"} if keep_freed_memory() else {}),
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """So many threads, no gradients."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, subjects: Sequence[Subject]) -> list[Timed]:
        """Converted copies, in a process that from now on gives every run the same pages."""
        keep_freed_memory()
        return [each(self.callable(subject)) for subject in subjects]

    def callable(self, subject: Subject) -> Callable[[], Any]:
        """A function of no arguments that runs the module once."""
        module, args, kwargs = self.ready(subject)
        return lambda: module(*args, **kwargs)

    def ready(self, subject: Subject) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Converted, and run once."""
        module, args, kwargs = converted(subject, self.dtype, self.memory_format)
        try:
            module(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be run with {self.dtype}: {first_line(error)}"
            ) from error
        return module, args, kwargs

    def write(self, subject: Subject, folder: Path) -> None:
        """Exported by torch.export, which keeps the operations as they are, with the inputs."""
        import warnings

        import torch

        module, args, kwargs = converted(subject, self.dtype, self.memory_format)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporter's own internals
                program = torch.export.export(module, args, kwargs, strict=False)
                torch.export.save(program, folder / _PROGRAM)
        except OSError:
            raise
        except Exception as error:
            name = type(subject.module).__name__
            raise InputError(
                f"target {self.called}: {name} can't be exported to measure its memory: {first_line(error)}"
            ) from error

    def loaded(self, folder: Path) -> Callable[[], Any]:
        """A function of no arguments that runs what `write` wrote.

        `torch.export.load` unpickles the example inputs, so it must never see a file of somebody else's. This one was
        written by the parent process a moment ago, to a folder that only this user can write to.
        """
        import torch

        program = torch.export.load(folder / _PROGRAM)
        assert program.example_inputs is not None
        module, (args, kwargs) = program.module(), program.example_inputs
        return lambda: module(*args, **kwargs)


def converted(
    subject: Subject, dtype: str, memory_format: str, device: str = "cpu"
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Module and inputs with this dtype, memory format and device; a copy where anything differs."""
    import torch

    from rankopt.nest import mapped

    wanted, layout = getattr(torch, dtype), getattr(torch, memory_format + "_format", None) or torch.channels_last

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device, wanted if tensor.is_floating_point() else None)
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous()

    module = subject.module
    values = (*module.parameters(), *module.buffers())
    if any(m.training for m in module.modules()) or any(_differs(v, wanted, layout, device) for v in values):
        module = copy.deepcopy(module).eval().to(device=device, dtype=wanted)
        module = module.to(memory_format=layout)  # type: ignore[call-overload]
    return module, *mapped((subject.args, dict(subject.kwargs)), convert)


def _differs(value: Tensor, dtype: torch.dtype, layout: torch.memory_format, device: str) -> bool:
    import torch

    wanted = torch.device(device)
    elsewhere = value.device.type != wanted.type or wanted.index not in (None, value.device.index)
    laid_out = value.dim() != 4 or value.is_contiguous(memory_format=layout)
    return elsewhere or not laid_out or (value.is_floating_point() and value.dtype != dtype)


def first_line(error: BaseException) -> str:
    """What an error says, on one line; lines that only say where in a runtime's sources it was raised are left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not _PLACE.match(line.strip())]
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"[:300]
