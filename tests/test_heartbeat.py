"""Who is taken for dead: by the system on this machine, by a time that is not renewed elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from test_loop import loop_on
from test_study import trials_of

from rankopt import heartbeat
from rankopt.heartbeat import BEAT, DEAD_AFTER_S, WORKER, Heartbeat, Liveness, seems_alive
from rankopt.storages import open_storage


def running(worker: dict[str, Any] | None, beat: float | None = None) -> FrozenTrial:
    attributes: dict[str, Any] = {BEAT: time.time() if beat is None else beat}
    if worker is not None:
        attributes[WORKER] = worker
    made = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
    made._trial_id = 7
    return made


@pytest.fixture
def own() -> Heartbeat:
    return Heartbeat(open_storage(None))


def test_a_worker_of_this_process_lives_until_it_is_closed(own: Heartbeat) -> None:
    trial = running(own.worker, beat=0.0)
    assert Liveness().alive(trial)
    assert seems_alive(trial)
    own.close()
    assert not Liveness().alive(trial)
    assert not seems_alive(trial)


def test_a_process_of_this_machine_lives_as_long_as_the_system_says(own: Heartbeat) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = {**own.worker, "pid": process.pid, "started": heartbeat._started(process.pid)}
    assert Liveness().alive(running(worker, beat=0.0))  # however long ago it was heard of
    assert not Liveness().alive(running({**worker, "started": worker["started"] - 100}))  # the number was taken again
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert not Liveness().alive(running(worker))  # not waited for yet: a zombie
    process.communicate()
    assert not Liveness().alive(running(worker))


def test_elsewhere_it_is_watched_whether_the_time_is_renewed(own: Heartbeat) -> None:
    now = 0.0
    liveness = Liveness(clock=lambda: now)
    worker = {**own.worker, "place": "another machine"}
    ahead = time.time() + 600  # a clock that goes wrong
    assert liveness.alive(running(worker, ahead))
    now = DEAD_AFTER_S - 1
    assert liveness.alive(running(worker, ahead))
    assert liveness.alive(running(worker, ahead + 15))  # renewed
    now += DEAD_AFTER_S - 1
    assert liveness.alive(running(worker, ahead + 15))
    now += 2
    assert not liveness.alive(running(worker, ahead + 15))
    assert not Liveness().alive(running(worker, time.time() - 86400))  # since yesterday: no need to watch
    assert not seems_alive(running(worker, time.time() - DEAD_AFTER_S - 1))
    assert seems_alive(running(worker, time.time() - DEAD_AFTER_S + 5))


def test_a_trial_without_a_worker_is_dead() -> None:
    assert not Liveness().alive(running(None))


def test_the_time_is_renewed_while_a_trial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat.__init__, "__defaults__", (0.05,))
    url = str(tmp_path / "s.db")
    loop = loop_on(url)
    asked = loop.ask()
    assert asked is not None
    times = set()
    end = time.monotonic() + 20
    while len(times) < 3 and time.monotonic() < end:
        times.add(trials_of(url)[0].user_attrs[BEAT])
        time.sleep(0.02)
    assert len(times) == 3
    loop.tell(asked, "enough")
    loop.close()
    assert trials_of(url)[0].state.name == "FAIL"


def test_places_are_the_same_for_all_processes_of_a_machine() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(heartbeat._place) == heartbeat._place()
