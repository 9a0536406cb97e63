"""Whether the workers of running trials still live: each carries who runs it, and a time that is renewed.

Optuna has heartbeats of its own, but only where it runs the loop.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import psutil
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

WORKER, BEAT = "worker", "heartbeat"  # attributes of a trial
EVERY_S = 15.0
DEAD_AFTER_S = 90.0  # without a renewed time
_LONG_S = 3600.0  # by how much the clocks of two machines don't differ

_here: set[str] = set()  # workers of this process that have not ended


def identity() -> dict[str, Any]:
    """This process, so that others can tell whether it lives."""
    pid = os.getpid()
    return {"host": platform.node(), "place": _place(), "pid": pid, "started": _started(pid)}


def lives(process: Mapping[str, Any] | None) -> bool | None:
    """Whether the process of an `identity` lives; None where this machine can't tell."""
    if process is None:
        return False
    if process.get("place") != _place():
        return None
    return _started(int(process.get("pid", -1))) == process.get("started")


class Heartbeat:
    """Renews the time of the trials that are under way here, from a thread of its own.

    Attributes:
        worker: who runs them, for their attributes.
    """

    def __init__(self, storage: BaseStorage, every: float = EVERY_S) -> None:
        self._storage, self._every = storage, every
        self._trials: set[int] = set()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.worker = {"id": uuid.uuid4().hex, **identity()}
        _here.add(self.worker["id"])

    def add(self, trial: int) -> None:
        """A trial (its id in the storage) is under way; it was begun with `attributes`."""
        self._trials.add(trial)
        if self._thread is None and not isinstance(self._storage, InMemoryStorage):
            self._thread = threading.Thread(target=self._beat, name="rankopt heartbeat", daemon=True)
            self._thread.start()

    def attributes(self) -> dict[str, Any]:
        """What a trial carries from its beginning."""
        return {WORKER: self.worker, BEAT: time.time()}

    def remove(self, trial: int) -> None:
        """A trial has ended."""
        self._trials.discard(trial)

    def close(self) -> None:
        """This worker runs nothing any more."""
        _here.discard(self.worker["id"])
        self._trials.clear()
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._every):
            for trial in list(self._trials):
                with suppress(Exception):  # it has just ended; or what is wrong will be said where something is written
                    self._storage.set_trial_user_attr(trial, BEAT, time.time())


class Liveness:
    """Whether a trial's worker lives, as far as can be told from here.

    On this machine the system knows. Elsewhere a worker is taken for dead when its time was not renewed while it was
    watched from here for `DEAD_AFTER_S`; the clocks of the two machines need not agree.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, tuple[Any, float]] = {}

    def alive(self, trial: FrozenTrial) -> bool:
        """Whether somebody is at work on a running trial."""
        known = _known(trial.user_attrs.get(WORKER))
        if known is not None:
            return known
        beat, now = trial.user_attrs.get(BEAT, 0.0), self._clock()
        last, since = self._seen.get(trial._trial_id, (None, now))
        if last != beat:
            since = now
        self._seen[trial._trial_id] = (beat, since)
        return now - since < DEAD_AFTER_S and time.time() - beat < _LONG_S


def seems_alive(trial: FrozenTrial) -> bool:
    """The same at one glance, for people: by the time that was renewed last, if the worker is on another machine."""
    known = _known(trial.user_attrs.get(WORKER))
    return time.time() - trial.user_attrs.get(BEAT, 0.0) < DEAD_AFTER_S if known is None else known


def _known(worker: Mapping[str, Any] | None) -> bool | None:
    """The same for a worker: one of this process that has ended is as dead as one whose process has."""
    known = lives(worker)
    return known and (worker is None or worker["pid"] != os.getpid() or worker.get("id") in _here)


@cache
def _place() -> str:
    """Names a running system, so that process numbers mean the same: a machine since it was started, or a container."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"{platform.node()} {uuid.getnode()}"


def _started(pid: int) -> float | None:
    """When a process was started, to a second; None where there is no such process (or it is a zombie)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time())
    except (psutil.Error, OSError, ValueError):
        return None
