"""``torch``: PyTorch on the CPU, operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.machine import cpu_conditions
from rankopt.targets.target import LocalTarget, Subject
from rankopt.timing import Timed, each

if TYPE_CHECKING:
    from torch import nn

MemoryFormat = Literal["contiguous", "channels_last"]


class TorchCpu(LocalTarget):
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
        """Machine, version, threads, dtype, memory format."""
        import torch

        return {
            "target": self.name,
            **cpu_conditions(),
            "runtime": f"torch {torch.__version__}",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": str(self.threads),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
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
        """Converted copies."""
        return [each(self.callable(subject)) for subject in subjects]

    def callable(self, subject: Subject) -> Callable[[], Any]:
        """A function of no arguments that runs the module once."""
        module, args, kwargs = converted(subject, self.dtype, self.memory_format)
        try:
            module(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be run with {self.dtype}: {first_line(error)}"
            ) from error
        return lambda: module(*args, **kwargs)


def converted(
    subject: Subject, dtype: str, memory_format: str, device: str = "cpu"
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Module and inputs with this dtype, memory format and device; a copy where anything differs."""
    import torch
    from torch import Tensor

    from rankopt.nest import mapped

    wanted, layout = getattr(torch, dtype), getattr(torch, memory_format + "_format", None) or torch.channels_last

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device, wanted if tensor.is_floating_point() else None)
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous()

    module = subject.module
    if module.training or any(_differs(p, wanted, memory_format, device) for p in module.parameters()):
        module = copy.deepcopy(module).eval().to(device=device, dtype=wanted)
        module = module.to(memory_format=layout)  # type: ignore[call-overload]
    return module, *mapped((subject.args, dict(subject.kwargs)), convert)


def _differs(parameter: Any, dtype: Any, memory_format: str, device: str) -> bool:
    import torch

    layout = parameter.dim() == 4 and (
        parameter.is_contiguous(memory_format=torch.channels_last) != (memory_format == "channels_last")
    )
    moved = parameter.device.type != torch.device(device).type
    return layout or moved or (parameter.is_floating_point() and parameter.dtype != dtype)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
