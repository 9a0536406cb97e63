"""Between Ray Tune and a study: what Tune runs (`Worker`), whom it asks (`Bridge`), and whom it tells (`Watch`).

A trial of Tune's is a worker, for as long as there is work, and every result that it gives is a trial of the study. The
plan that comes next is called to it (`take`) while Tune looks at the result, before Tune calls for another one; an
actor answers calls in the order in which they were made. A trial of Tune's for every plan would be slower, and breaks
down where workers take longer to start than plans to judge: Tune gives a worker that has become free to the plan that
has waited longest, though one is being started for it, and ends the start; so the workers never become more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rankopt.executors.worker import Judge, carried_out, order, pin
from rankopt.ray_environment import quiet

quiet()
import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

if TYPE_CHECKING:
    from rankopt.executors.carrying import Carrying

_REST_S = 0.1  # between two workers that come back from resting
_LONGEST_REST_S = 2.0


class Worker(tune.Trainable):
    """A worker process: one `Trainable` that judges plan after plan."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths that the metric reads are relative to the user's folder
        super().__init__(*args, **kwargs)

    def setup(self, config: dict[str, Any], judge: Judge, threads: int, seconds: float | None) -> None:  # type: ignore[override]
        """With what came through the object store."""
        self._judge, self._seconds = judge, seconds
        self._order, self._rest, self._leaving = config["order"], 0.0, False
        self._node = ray.get_runtime_context().get_node_id()
        pin(threads)

    def take(self, text: str) -> None:
        """The plan of the next step."""
        self._order = text

    def rest(self, seconds: float) -> None:
        """There is none for now."""
        self._rest = seconds

    def leave(self) -> None:
        """There will be none."""
        self._rest, self._leaving = 0.0, True

    def step(self) -> dict[str, Any]:
        """Judge the plan."""
        text, self._order = self._order, None
        if text is not None:
            return {"told": carried_out(self._judge, text, self._seconds, self._node)}
        time.sleep(self._rest)
        return {"told": None, "done": self._leaving}


class _Interrupted(Exception):
    """Ctrl-C, as something after which Tune tidies up."""


class Bridge(Searcher):
    """Asks the study for plans, and tells it of results. All in one thread.

    What is raised while Tune looks at a result, Tune makes an error of its own; so it is kept until `settle`, which is
    called between two of Tune's steps. Endings are only noted where Tune tells of them, in the middle of changing its
    own state.
    """

    def __init__(self, carrying: Carrying) -> None:
        super().__init__()
        self.carrying = carrying
        self.tune_trials: Sequence[Any] = ()
        self._workers = set[str]()
        self._resting = set[str]()
        self._inside = False
        self._interrupted = False
        self._raised: BaseException | None = None

    def suggest(self, trial_id: str) -> Any:
        """A worker more with its first plan, None when none is needed for now, FINISHED when none will be."""
        with self._ours():
            if self._workers and len(self._workers) >= self.carrying.room():
                return None
            asked = self.carrying.next()
            if asked is None:
                return Searcher.FINISHED if self.carrying.loop.finished else None
            self._workers.add(trial_id)
            self.carrying.takes(trial_id, asked)
            return {"order": order(asked.trial.number, asked.proposal.plan)}

    def gave(self, worker: str, told: str | None, actor: Any) -> None:
        """A worker came back, from a plan or from resting: tell of it, and say what comes next before Tune calls it."""
        try:
            with self._ours():
                self._resting.discard(worker)
                if told is not None:
                    self.carrying.ended(worker, told)
                asked = self.carrying.next()
                if asked is not None:
                    self.carrying.takes(worker, asked)
                    self.carrying.started(worker)
                    actor.take.remote(order(asked.trial.number, asked.proposal.plan))
                elif self.carrying.loop.drained:
                    actor.leave.remote()
                else:
                    self._resting.add(worker)
                    actor.rest.remote(min(_REST_S * len(self._resting), _LONGEST_REST_S))
        except BaseException as error:
            self._raised = self._raised or error

    def settle(self) -> None:
        """Between two events."""
        if self._raised is not None:
            raise self._raised
        with self._ours():
            self.carrying.settle()

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: see `gave`."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """A worker is gone. Note it."""
        self._workers.discard(trial_id)
        self._resting.discard(trial_id)
        self.carrying.ended(trial_id, None)

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


class Watch(tune.Callback):
    """What Tune tells a callback and not a searcher."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Between two events."""
        self.bridge.tune_trials = trials
        self.bridge.settle()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is there, and has its first plan."""
        self.bridge.carrying.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """A worker came back; with `done` it is leaving."""
        if not result.get("done"):
            self.bridge.gave(trial.trial_id, result["told"], trial.temporary_state.ray_actor)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is gone."""
        self.bridge.carrying.died(
            trial.trial_id, Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
        )
