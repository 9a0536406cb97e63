"""`Exporter`: a format that a model is written in for a runtime. One file a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rankopt.traced import Call, Traced

Run = Callable[[Call], list[Tensor]]


class Exporter(ABC):
    """Writes a traced model, and runs what was written.

    Attributes:
        name: as it is asked for.
        files: what it writes, within the model's directory.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def missing(self) -> str | None:
        """What has to be installed before it can be written and checked; None when all is there."""

    @abstractmethod
    def write(self, traced: Traced, folder: Path) -> dict[str, Any]:
        """Write the files; returns what is to be stated, such as the opset. May raise anything."""

    @abstractmethod
    def run(self, folder: Path) -> Run:
        """A function from a call to the output tensors, in order, that runs what is in the folder.

        The files may come from somebody else. Raises `ArtifactError` for what can't be trusted.
        """

    @abstractmethod
    def runtime(self) -> str:
        """Name and version of what runs it."""
