"""`RayTune`: trials on the workers of a Ray cluster, or on the processors of this machine. Ray Tune runs them.

Ray Tune knows nothing of objectives, limits and the ledger: one of its trials judges one plan in a worker process, and
its searcher (`_Bridge`) passes asking and telling on to the study's loop, in this process and thread. So a trial has as
many objectives as it likes, and what Tune keeps of it is never read again.

What is measured on a device is not part of Tune's trial, which holds its resources from its beginning to its end: a
device would be taken while the quality is computed. It is measured from here, after that, one plan at a time: targets
on other machines by a thread (their node is asked through Ray itself, see `targets.ray_node`), so that workers go on
meanwhile; targets on this machine while the trials that run here are waited for.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rankopt.errors import InputError, reason_of
from rankopt.executors.worker import Judge, carried_out, order, pin, threads_of
from rankopt.ray_environment import quiet

quiet()
import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

if TYPE_CHECKING:
    from rankopt.evaluate import Evaluate
    from rankopt.executors.carrying import Carrying
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
            bridge = _Bridge(Carrying(loop, evaluate, told, self.room, self.trial_timeout))
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
                    callbacks=[_Watch(bridge)],
                    num_samples=-1,
                    verbose=0,
                    reuse_actors=True,
                    raise_on_failed_trial=False,
                    trial_name_creator=lambda trial: trial.trial_id,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                )

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
        from rankopt.targets.ray_node import by_value

        try:
            with by_value(ray, list(sys.modules)):  # the model's classes, the metric: whatever is not installed
                # put here: what Tune fails to put it tries to put again at every later ray.init of this process
                given = ray.put(judge)
                made = tune.with_parameters(_Worker, judge=given, threads=self.threads, seconds=self.trial_timeout)
        except Exception as error:
            raise InputError(
                f"executor ray: the model, data or metric can't be sent to workers: {reason_of(error)}"
            ) from error
        return tune.with_resources(made, tune.PlacementGroupFactory([dict(self.needs)]))


class _Worker(tune.Trainable):
    """A worker process: one `Trainable` that judges plan after plan."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths that the metric reads are relative to the user's folder
        super().__init__(*args, **kwargs)

    def setup(self, config: dict[str, Any], judge: Judge, threads: int, seconds: float | None) -> None:  # type: ignore[override]
        """With what came through the object store."""
        self._judge, self._seconds = judge, seconds
        self._node = ray.get_runtime_context().get_node_id()
        pin(threads)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next plan."""
        return True

    def step(self) -> dict[str, Any]:
        """Judge the plan."""
        return {"told": carried_out(self._judge, self.config["order"], self._seconds, self._node), "done": True}


class _Interrupted(Exception):
    """Ctrl-C, as something after which Tune tidies up."""


class _Bridge(Searcher):
    """Between Tune, which asks for trials and says how they ended, and the study's. All in one thread.

    Tune calls `on_trial_complete` while it changes its own state and swallows what is raised there, so endings are
    only noted then, and `settle` is called between two of Tune's steps.
    """

    def __init__(self, carrying: Carrying) -> None:
        super().__init__()
        self.carrying = carrying
        self.tune_trials: Sequence[Any] = ()
        self._inside = False
        self._interrupted = False

    def suggest(self, trial_id: str) -> Any:
        """The next plan to be judged, None when there is none for now, FINISHED when there will be none."""
        with self._ours():
            asked = self.carrying.next()
            if asked is None:
                return Searcher.FINISHED if self.carrying.loop.finished else None
            self.carrying.takes(trial_id, asked)
            return {"order": order(asked.trial.number, asked.proposal.plan)}

    def settle(self) -> None:
        """Between two events."""
        with self._ours():
            self.carrying.settle()

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Note it."""
        self.carrying.ended(trial_id, None if error or result is None else result.get("told"))

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger is the study's storage."""

    def get_state(self) -> dict[str, Any]:
        """Nothing, as above."""
        return {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around Tune's run. Ctrl-C becomes KeyboardInterrupt again after Tune has tidied up."""
        before = signal.getsignal(signal.SIGINT)
        usr1 = signal.getsignal(signal.SIGUSR1)  # Tune takes it
        in_main = threading.current_thread() is threading.main_thread()

        def ring(number: int, frame: FrameType | None) -> None:
            if self._inside and callable(before):
                before(number, frame)
            else:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one at once
                self._interrupted = True

        if in_main and callable(before):
            signal.signal(signal.SIGINT, ring)
        try:
            with self.carrying.open():
                yield
        except _Interrupted:
            raise KeyboardInterrupt from None
        finally:
            if in_main:
                signal.signal(signal.SIGUSR1, usr1)
                if signal.getsignal(signal.SIGINT) is ring:
                    signal.signal(signal.SIGINT, before)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """What is done in here may be interrupted anywhere. What is raised ends Tune's run, and its workers at once."""
        try:
            self._inside = True
            if self._interrupted:
                raise _Interrupted
            yield
        except KeyboardInterrupt:
            self._kill_workers()
            raise _Interrupted from None
        except BaseException:
            self._kill_workers()
            raise
        finally:
            self._inside = False

    def _kill_workers(self) -> None:
        for trial in self.tune_trials:
            actor = trial.temporary_state.ray_actor
            if actor is not None:
                ray.kill(actor)


class _Watch(tune.Callback):
    """What Tune tells a callback and not a searcher."""

    def __init__(self, bridge: _Bridge) -> None:
        self.bridge = bridge

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Between two events."""
        self.bridge.tune_trials = trials
        self.bridge.settle()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its worker is there."""
        self.bridge.carrying.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its worker is gone."""
        self.bridge.carrying.died(
            trial.trial_id, Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        )


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
