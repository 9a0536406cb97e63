"""`chosen`: the executor that somebody names; `trainings`: how it trains finalists."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rankopt.executor_options import ExecutorOptions, executor_section
from rankopt.yaml_file import parse

if TYPE_CHECKING:
    from rankopt import halving
    from rankopt.executors.executor import Executor


def chosen(
    given: str | Mapping[str, Any] | ExecutorOptions | Executor | None,
    threads: int = 1,
    trial_timeout: float | None = None,
    cluster: str | None = None,
) -> Executor:
    """An executor from its name, its options, or as it is; None is `Local`.

    Args:
        given: ``"local"``, ``"ray"``, ``{"name": "ray", "workers": 4}``, or an executor of your own.
        threads: that a trial uses.
        trial_timeout: seconds after which a trial is given up (None: never).
        cluster: the address to take where none is given.

    Raises:
        InputError: an option is wrong, or Ray is not installed.
    """
    from rankopt.executors.local import Local  # both executors load Optuna: only a search that runs pays for it

    if given is None:
        return Local(trial_timeout)
    if not isinstance(given, str | Mapping | ExecutorOptions):
        return given
    if not isinstance(given, ExecutorOptions):
        given = parse(ExecutorOptions, executor_section(given), "executor: ")
    if given.name == "local":
        return Local(trial_timeout)
    from rankopt.executors.ray_tune import RayTune

    return RayTune(
        given.workers,
        given.address or cluster,
        cpus_per_trial=given.cpus_per_trial,
        gpus_per_trial=given.gpus_per_trial,
        resources_per_trial=given.resources_per_trial,
        threads=threads,
        trial_timeout=trial_timeout,
    )


def trainings(executor: Executor) -> AbstractContextManager[halving.Executor]:
    """What trains finalists where this executor would carry out trials; in this process unless it has ``trainings``."""
    from rankopt.halving import one_by_one

    made = getattr(executor, "trainings", None)
    found: AbstractContextManager[halving.Executor] = nullcontext(one_by_one) if made is None else made()
    return found
