"""``executorch``: a program for ExecuTorch with XNNPACK, where that package is installed."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

from rankopt.exports.exporter import Exporter, Run
from rankopt.nest import tensors
from rankopt.traced import Call, Traced, quiet

PROGRAM = "model.pte"


class ExecuTorch(Exporter):
    """Lowered to XNNPACK as far as that goes; the rest runs on ExecuTorch's portable kernels."""

    name: ClassVar[str] = "executorch"
    files: ClassVar[tuple[str, ...]] = (PROGRAM,)

    def missing(self) -> str | None:
        """Of the package."""
        if importlib.util.find_spec("executorch") is None:
            return "needs the package executorch; pip install executorch (one that fits the installed torch)"
        return None

    def write(self, traced: Traced, folder: Path) -> dict[str, Any]:
        """One file."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        with quiet():
            lowered = to_edge_transform_and_lower(traced.program, partitioner=[XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
        (folder / PROGRAM).write_bytes(content)
        stated: dict[str, Any] = {"backend": "XNNPACK", "written_by": self.runtime()}
        if traced.batch is None:  # memory is planned ahead, so there is a bound that ExecuTorch chose
            sizes = _method(folder).metadata.input_tensor_meta(0).sizes()
            stated["largest_batch"] = int(sizes[0])
        return stated

    def run(self, folder: Path) -> Run:
        """By the runtime that the package brings."""
        method = _method(folder)

        def run(call: Call) -> list[torch.Tensor]:
            return [output for output in method.execute(tensors(call)) if isinstance(output, torch.Tensor)]

        return run

    def runtime(self) -> str:
        """ExecuTorch."""
        return f"executorch {version('executorch')}"


def _method(folder: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(folder / PROGRAM).load_method("forward")
