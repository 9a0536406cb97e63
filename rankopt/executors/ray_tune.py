"""`RayTune`: trials on the workers of a Ray cluster, or on the processors of this machine. Ray Tune runs them.

Ray Tune knows nothing of objectives, limits and the ledger: one of its trials is a worker that judges plan after plan,
each of its results is a trial of the study, and its searcher passes asking and telling on to the study's loop, in this
process and thread (see `bridge`). So a trial has as many objectives as it likes, and what Tune keeps of it is never
read again.

What is measured on a device is not part of Tune's trial, which holds its resources from its beginning to its end: a
device would be taken while the quality is computed. It is measured from here, after that, one plan at a time: targets
on other machines by a thread (their node is asked through Ray itself, see `targets.ray_node`), so that workers go on
meanwhile; targets on this machine while the trials that run here are waited for.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rankopt.errors import InputError
from rankopt.executors.worker import Judge, threads_of
from rankopt.ray_environment import quiet

quiet()
import ray  # noqa: E402
from ray import tune  # noqa: E402

from rankopt.executors.bridge import Bridge, Watch, Worker  # noqa: E402
from rankopt.executors.ray_training import RayTraining, sent  # noqa: E402

if TYPE_CHECKING:
    from rankopt.evaluate import Evaluate
    from rankopt.loop import Loop

_COUNT_S = 1.0  # after which the nodes are counted again
_TUNE = {  # quiet, without files, and in this process's own hands
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_THRESHOLD_S": "1000000000",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
}


class RayTune:
    """See above.

    Args:
        workers: how many trials at once, at most (None: as many as the nodes have room for, counted again and again).
        address: of a cluster, "auto" or "HOST:PORT". None: the one that this process is connected to or that
            RAY_ADDRESS names, else one of its own, which ends with it.
        cpus_per_trial: processors that are set aside for a trial (None: `threads`).
        gpus_per_trial: GPUs, or a part of one.
        resources_per_trial: further resources that a node needs to have.
        threads: that a trial uses.
        trial_timeout: seconds after which a trial is given up (None: never), counted in its worker. One that is stuck
            in compiled code ends with its process.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        *,
        cpus_per_trial: float | None = None,
        gpus_per_trial: float = 0.0,
        resources_per_trial: Mapping[str, float] | None = None,
        threads: int = 1,
        trial_timeout: float | None = None,
    ) -> None:
        self.workers, self.threads, self.trial_timeout = workers, threads, trial_timeout
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.needs = {"CPU": float(threads) if cpus_per_trial is None else cpus_per_trial}
        self.needs |= {"GPU": gpus_per_trial} if gpus_per_trial else {}
        self.needs |= dict(resources_per_trial or {})
        self._fits, self._counted = 0, -math.inf

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Ray is there inside. Raises `InputError` when no cluster answers."""
        from rankopt.targets.ray_node import connected

        begun_here, own, threads = not ray.is_initialized(), {}, {}
        if begun_here and self.address is None:
            workers = self.workers or max(1, int((os.cpu_count() or 1) // self.needs["CPU"]))
            own = {"num_cpus": math.ceil(workers * self.needs["CPU"]), "include_dashboard": False}
            threads = threads_of(self.threads)
        with _environment(threads):  # of the processes that are begun
            connected(self.address or "local", "executor ray", **own)
        try:
            yield
        finally:
            if begun_here:
                ray.shutdown()

    def run(self, loop: Loop, evaluate: Evaluate, told: Callable[[], None]) -> None:
        """Go on until nothing is left to do.

        Raises:
            InputError: no node has what a trial needs, or what is evaluated can't be sent to another process.
        """
        from rankopt.executors.carrying import Carrying, InTwoParts  # not in workers, which need no torch for it

        if not isinstance(evaluate, InTwoParts):
            raise InputError(f"executor ray: {type(evaluate).__name__} can't be parted; it carries out an Evaluator")
        if evaluate.device == "cuda" and "GPU" not in self.needs:
            raise InputError("executor ray: the model is on a GPU; say how much of one a trial needs by gpus_per_trial")
        with self.ready():
            self._check_room()
            bridge = Bridge(Carrying(loop, evaluate, told, self.room, self.trial_timeout))
            with ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankopt-tune-"))
                stack.enter_context(_environment({**_TUNE, "TUNE_MAX_PENDING_TRIALS_PG": str(self.workers or 256)}))
                stack.enter_context(_silent())
                stack.enter_context(bridge.open())
                tune.run(
                    self._trainable(evaluate.travelling()),
                    name="study",
                    storage_path=folder,
                    search_alg=bridge,
                    callbacks=[Watch(bridge)],
                    num_samples=-1,
                    verbose=0,
                    raise_on_failed_trial=False,
                    trial_name_creator=lambda trial: trial.trial_id,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                )

    @contextmanager
    def trainings(self) -> Iterator[RayTraining]:
        """How finalists are trained: on the workers that trials would have; see `halving.Executor`."""
        with self.ready():
            self._check_room()
            yield RayTraining(self.needs, self.room, self.threads)

    def room(self) -> int:
        """How many trials may be with workers at once: what was asked for, or what the nodes that are there can take.

        Where more was asked for than that, the rest waits in Ray, which lets a cluster grow that can.
        """
        if self.workers is not None:
            return self.workers
        if time.monotonic() > self._counted + _COUNT_S:
            self._fits, self._counted = self._fitting(), time.monotonic()
        return self._fits

    def _fitting(self) -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(int(min(node.get(key, 0.0) / much + 1e-9 for key, much in self.needs.items())) for node in nodes)

    def _check_room(self) -> None:
        if self._fitting() == 0:
            from rankopt.targets.ray_node import described

            wanted = ", ".join(f"{much:g} {key}" for key, much in self.needs.items())
            has = "; ".join(described(node["Resources"]) for node in ray.nodes() if node["Alive"])
            raise InputError(f"executor ray: no node has the {wanted} that a trial needs; the nodes have {has}")

    def _trainable(self, judge: Judge) -> Any:
        # put here: what Tune fails to put it tries to put again at every later ray.init of this process
        made = tune.with_parameters(Worker, judge=sent(judge), threads=self.threads, seconds=self.trial_timeout)
        return tune.with_resources(made, tune.PlacementGroupFactory([dict(self.needs)]))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _silent() -> Iterator[None]:
    """What Tune logs is for those who debug it: failures are in the study, and progress is shown by its watchers."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
