"""Who is told of a search that the command line runs: the terminal, a log file, TensorBoard, MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.handover import console_for

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile


@contextmanager
def watched(
    file: StudyFile, tensorboard: Path | None, mlflow: str | None, log: Path | None, quiet: bool
) -> Iterator[Callable[[Any], None]]:
    """Give a callback that tells all who were named; what can't be opened is refused before the search begins."""
    from rankopt.callbacks import MLflow, TensorBoard, together
    from rankopt.log_file import logged
    from rankopt.progress import shown

    callbacks: list[Callable[[Any], None]] = []
    with ExitStack() as stack:
        callbacks.append(stack.enter_context(logged(log)))
        if tensorboard is not None:
            callbacks.append(stack.enter_context(TensorBoard(tensorboard)))
        if mlflow is not None:
            params = {"study": file.name, "limits": ", ".join(map(str, file.limits)) or "none"}
            callbacks.append(stack.enter_context(MLflow(mlflow, name=file.name, params=params)))
        if not quiet:
            callbacks.append(stack.enter_context(shown(console_for(stderr=True))))
        yield together(*callbacks)
