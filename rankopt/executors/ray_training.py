"""`RayTraining`: finalists of successive halving, several at once, on the workers of a Ray cluster.

A training is a task of Ray's, which begins it again, on another node if need be, when its worker or node dies; there it
goes on from its last checkpoint. Every node has to see the folder of the checkpoints.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rankopt.errors import InputError, RankoptError, TrainingError, reason_of
from rankopt.executors.deaths import cause_of
from rankopt.executors.worker import pin
from rankopt.halving import Outcome, Train, Values
from rankopt.ray_environment import quiet

quiet()
import ray  # noqa: E402

_POLL_S = 1.0
_RETRIES = 3  # of a training whose worker or node died


class RayTraining:
    """See above; an `Executor` of `halving.halve`.

    Args:
        needs: what a training takes: CPU, GPU and resources of one's own.
        room: how many at once.
        threads: of each.
    """

    def __init__(self, needs: Mapping[str, float], room: Callable[[], int], threads: int) -> None:
        self.room, self.threads = room, threads
        self.needs = {"num_cpus": needs.get("CPU", 1.0), "num_gpus": needs.get("GPU", 0.0)}
        self.own = {key: much for key, much in needs.items() if key not in ("CPU", "GPU")}

    def __call__(self, train: Train, tasks: Sequence[tuple[str, int]]) -> Iterator[Outcome]:
        """Carry out these trainings; what is done first comes first.

        A training that does not stay finite, or whose workers die again and again, is an outcome.

        Raises:
            InputError: what trains can't be sent to another process.
            RankoptError: what else a training raised.
        """
        if not tasks:
            return
        travelling = getattr(train, "travelling", None)
        given = sent(train if travelling is None else travelling())
        job = ray.remote(_trained).options(
            **self.needs, resources=self.own, max_retries=_RETRIES, scheduling_strategy="SPREAD"
        )
        waiting, running = deque(tasks), dict[Any, str]()
        try:
            while waiting or running:
                while waiting and len(running) < max(1, self.room()):
                    name, steps = waiting.popleft()
                    running[job.remote(given, name, steps, self.threads)] = name
                done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
                for one in done:
                    yield _outcome(running.pop(one), one)
        finally:  # also when interrupted: what has been trained is in the checkpoints
            for one in running if ray.is_initialized() else ():
                ray.cancel(one, force=True)


def sent(what: Any) -> Any:
    """Ray's reference to something that workers are given; raises `InputError` where it can't be sent."""
    from rankopt.targets.ray_node import by_value

    try:
        with by_value(ray, list(sys.modules)):  # the model's classes, the metric: whatever is not installed
            return ray.put(what)
    except Exception as error:
        raise InputError(
            f"executor ray: the model, data or metric can't be sent to workers: {reason_of(error)}"
        ) from error


def _trained(train: Train, name: str, steps: int, threads: int) -> tuple[Values | None, str]:
    """What a worker does."""
    pin(threads)
    try:
        return dict(train(name, steps)), ""
    except TrainingError as error:
        return None, error.message


def _outcome(name: str, task: Any) -> Outcome:
    try:
        values, reason = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RankoptError):
            raise error.cause from None
        raise RankoptError(f"{name}: its training ended: {reason_of(error.cause)}") from error
    except ray.exceptions.RayError as error:
        return name, None, f"{cause_of(str(error))[0]}; it was begun {_RETRIES + 1} times"
    return name, values, reason
