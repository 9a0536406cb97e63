"""kill -9 of Ray's workers and of the driver that they work for, at random moments."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from parted import Parted
from programs import Ended, Programs, check, front_of, seen, small_study
from test_carrying import loop_of

from rankopt.executors.local import Local
from rankopt.executors.ray_tune import RayTune

ray = pytest.importorskip("ray")
SECONDS = 0.15  # of a trial


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
        yield
        ray.shutdown()


def workers() -> list[int]:
    """Of this process's Ray: those that a trial is running on."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::Worker.train" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class Killer:
    """Kills a worker now and then while it is in force."""

    def __init__(self, seed: int, most: int) -> None:
        self.chance, self.most, self.killed, self._over = random.Random(seed), most, 0, threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._over.set()
        self._thread.join()

    def _kill(self) -> None:
        while self.killed < self.most and not self._over.wait(self.chance.uniform(0.05, 1.5)):
            if found := workers():
                os.kill(self.chance.choice(found), signal.SIGKILL)
                self.killed += 1


def one_round(folder: Path, seed: int) -> None:
    """One worker, so that the order of results is fixed: what is found is what is found without any interruption."""
    urls = [str(folder / name) for name in ("whole.db", "s.db")]
    whole = loop_of(10, urls[0])
    Local().run(whole, Parted(), lambda: None)
    whole.close()
    loop = loop_of(10, urls[1])
    with Killer(seed, 2) as killer:
        RayTune(1).run(loop, Parted(seconds=SECONDS), lambda: None)
    loop.close()
    check(urls[1], {}, 10, name="s")
    died = [t.user_attrs["died"] for t in loop.study.get_trials(deepcopy=False) if "died" in t.user_attrs]
    assert sum(map(len, died)) == killer.killed
    found, wanted = ([(plan, values[:-1]) for plan, values in front_of(url, "s")] for url in (urls[1], urls[0]))
    assert found == wanted  # the last value says whether torch was loaded, which it is here and not in workers


@pytest.mark.parametrize("seed", range(5))
def test_workers_are_killed(started: None, tmp_path: Path, seed: int) -> None:
    one_round(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 105))
def test_workers_are_killed_a_hundred_times(started: None, tmp_path: Path, seed: int) -> None:
    one_round(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_the_driver_is_killed_and_its_workers_go_with_it(programs: Programs, tmp_path: Path, seed: int) -> None:
    study, url = small_study(tmp_path, SECONDS), f"sqlite:///{tmp_path / 's.db'}"
    options = ("--quiet", "--executor", "ray", "--workers", "2", "--storage", url)
    chance, before = random.Random(seed), dict[int, Ended]()
    for _ in range(2):
        program = programs.start("search", study, *options)
        for _ in range(600):
            if len(seen(url)) > len(before) or program.poll() is not None:
                break
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 2))
        family = [p.pid for p in psutil.Process(program.pid).children(recursive=True)] if program.poll() is None else []
        program.kill()
        now = seen(url)
        assert {number: now[number] for number in before} == before
        before = now
        gone_by = time.monotonic() + 120  # Ray's own agents look for their parent now and then
        while any(psutil.pid_exists(pid) for pid in family):
            assert time.monotonic() < gone_by, f"left behind: {family}"
            time.sleep(0.5)
    program = programs.start("search", study, *options)
    assert program.wait(300) == 0, program.log.read_text()
    check(url, before)
