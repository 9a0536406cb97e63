"""``torch-compile``: PyTorch on the CPU, compiled by torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.measurement import Measurement
from rankopt.targets.target import Subject, Target
from rankopt.targets.torch_cpu import TorchCpu, first_line

# Compiled code belongs to the function that was compiled, which modules of one class share. Above the limit (8 unless
# it is raised) torch runs the rest operation by operation, without an error.
_LIMITS: dict[str, Any] = {"recompile_limit": 1024, "accumulated_recompile_limit": 8192, "suppress_errors": False}


class TorchCompile(TorchCpu):
    """PyTorch on the CPU, compiled. Compiling takes many seconds a model and is not part of the time.

    All that this process compiled before is forgotten, before and after a measurement.

    Attributes:
        mode: of torch.compile.
    """

    name: ClassVar[str] = "torch-compile"
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"

    def conditions(self) -> dict[str, str]:
        """As on ``torch``, and the mode."""
        return {**super().conditions(), "mode": self.mode}

    def for_layers(self) -> Target:
        """``torch``: there are too many layers to compile them all."""
        return TorchCpu(
            label=self.label,
            batch=self.batch,
            threads=self.threads,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """As on ``torch``, with room for the code of many models."""
        import torch._dynamo

        torch._dynamo.reset()
        try:
            with super().running(), torch._dynamo.config.patch(_LIMITS):
                yield
        finally:
            torch._dynamo.reset()

    def callable(self, subject: Subject) -> Callable[[], Any]:
        """A function of no arguments that runs the compiled module once."""
        import torch

        module, args, kwargs = self.ready(subject)
        values = (*module.parameters(), *module.buffers())
        module = copy.deepcopy(module, {id(v): v for v in values})  # the compiler leaves attributes on modules
        compiled = torch.compile(module, mode=self.mode, fullgraph=False, dynamic=False)
        try:
            for _ in range(2):
                compiled(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be compiled: {first_line(error)}; measure it on target torch"
            ) from error
        return lambda: compiled(*args, **kwargs)

    def peak_memory(self, subject: Subject) -> Measurement:
        """Not measured: most of it would be the compiler's."""
        return Target.peak_memory(self, subject)
