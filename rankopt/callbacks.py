"""Progress callbacks that write to TensorBoard and MLflow; several at once with `together`.

::

    with TensorBoard("runs/tensorboard") as board:
        rankopt.search(model, example, calibration=images, progress=board)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rankopt.errors import InputError
from rankopt.result import Progress


def together(*callbacks: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """One callback that tells several, in order."""

    def tell(progress: Progress) -> None:
        for callback in callbacks:
            callback(progress)

    return tell


class _Closing:
    """What is closed at the end of a with statement."""

    def close(self, failed: bool = False) -> None:
        """Write what is left."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


class TensorBoard(_Closing):
    """Scalars by trial: ``trial/…`` what it measured, ``best/…`` the best within the limits, ``hypervolume``.

    Args:
        folder: of the event files; a study that goes on continues there.

    Raises:
        InputError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                "TensorBoard: needs tensorboardX; install it with: pip install 'rankopt[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def __call__(self, progress: Progress) -> None:
        """Write what a search told."""
        for key, value in scalars(progress).items():
            self._writer.add_scalar(key, value, _step(progress))
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow(_Closing):
    """Metrics of an MLflow run by trial, named as those of `TensorBoard`.

    The run is one of its own (the client is used, so an active run of yours is not touched), unless `run_id` names one.

    Args:
        tracking_uri: of the server or store (None: MLflow's own default).
        experiment: made if there is none of that name.
        run_id: a run to write to, which is left open.
        name: of a new run.
        params: recorded with a new run, e.g. the limits.

    Raises:
        InputError: MLflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "rankopt",
        run_id: str | None = None,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise InputError("MLflow: is not installed; install it with: pip install 'rankopt[mlflow]'") from None
        self._client = MlflowClient(tracking_uri)
        self._own = run_id is None
        if run_id is None:
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self._client.create_experiment(experiment)
            run_id = self._client.create_run(number, run_name=name).info.run_id
            for key, value in (params or {}).items():
                self._client.log_param(run_id, key, value)
        self.run_id: str = run_id

    def __call__(self, progress: Progress) -> None:
        """Write what a search told."""
        from mlflow.entities import Metric

        found = scalars(progress)
        if found:
            now, step = int(time.time() * 1000), _step(progress)
            metrics = [Metric(key, value, now, step) for key, value in found.items()]
            self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, failed: bool = False) -> None:
        """End the run, if it was begun here."""
        if self._own:
            self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def scalars(progress: Progress) -> dict[str, float]:
    """What a search told as named numbers, with ``.`` for ``@`` in their names; nothing while there is no trial yet."""
    found: dict[str, float] = {}
    if progress.entry is not None:
        found |= {f"trial/{k}": float(v) for k, v in progress.entry.measurements.items() if v is not None}
        found["trial/within_limits"] = float(progress.entry.feasible)
    if progress.best is not None:
        found |= {f"best/{k}": float(v) for k, v in progress.best.items() if v is not None}
    if progress.hypervolume is not None:
        found["hypervolume"] = progress.hypervolume
    return {key.replace("@", "."): value for key, value in found.items()}


def _step(progress: Progress) -> int:
    return progress.done if progress.entry is None else progress.entry.trial
