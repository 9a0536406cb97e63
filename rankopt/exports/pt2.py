"""``pt2``: a program of torch.export, which needs PyTorch alone and none of the code that made the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from rankopt.exports.exporter import Exporter, Run
from rankopt.nest import tensors
from rankopt.program_file import load_program, write_program
from rankopt.traced import Call, Traced

PROGRAM = "model.pt2"


class Pt2(Exporter):
    """By ``torch.export.save``; ``rankopt.load(DIR, standalone=True)`` reads it, and so does ``torch.export.load``."""

    name: ClassVar[str] = "pt2"
    files: ClassVar[tuple[str, ...]] = (PROGRAM,)

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def write(self, traced: Traced, folder: Path) -> dict[str, Any]:
        """One file."""
        write_program(traced.program, folder / PROGRAM)
        return {"written_by": f"torch {torch.__version__}"}

    def run(self, folder: Path) -> Run:
        """On the CPU."""
        module = load_program(folder / PROGRAM)

        def run(call: Call) -> list[torch.Tensor]:
            with torch.no_grad():
                return tensors(module(*call[0], **call[1]))

        return run

    def runtime(self) -> str:
        """PyTorch."""
        return f"torch {torch.__version__}"
