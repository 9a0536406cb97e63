"""kill -9 at random moments: nothing that was measured is lost or measured twice, and the end is the same."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import Ended, Programs, check, front_of, measured_study, measuring, seen, small_study

_KILLS = 2  # a round; a plan that is killed three times is given up


@dataclass
class Whole:
    """The study without any interruption: how long it took, and what it found."""

    study: Path
    seconds: float
    front: list[tuple[str, tuple[float, ...]]]


@pytest.fixture(scope="module")
def whole(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    study = small_study(folder)
    start = time.monotonic()
    program = programs.start("search", study, "--quiet", "--storage", folder / "whole.db")
    assert program.wait() == 0, program.log.read_text()
    url = f"sqlite:///{folder / 'whole.db'}"
    check(url, {})
    return Whole(study, time.monotonic() - start, front_of(url))


def one_round(programs: Programs, whole: Whole, url: str, seed: int) -> None:
    chance, before = random.Random(seed), dict[int, Ended]()
    for _ in range(_KILLS):
        program = programs.start("search", whole.study, "--quiet", "--storage", url)
        time.sleep(chance.uniform(0.05, 1.0) * whole.seconds)
        program.kill()
        now = seen(url)
        assert {number: now[number] for number in before} == before
        before = now
    program = programs.start("search", whole.study, "--quiet", "--storage", url)
    assert program.wait() == 0, program.log.read_text()
    check(url, before)
    assert front_of(url) == whole.front


def url_in(folder: Path, seed: int) -> str:
    return f"sqlite:///{folder / 's.db'}" if seed % 2 == 0 else f"journal:///{folder / 's.log'}"


@pytest.mark.parametrize("seed", range(5))
def test_the_driver_is_killed(programs: Programs, whole: Whole, tmp_path: Path, seed: int) -> None:
    one_round(programs, whole, url_in(tmp_path, seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 105))
def test_the_driver_is_killed_a_hundred_times(programs: Programs, whole: Whole, tmp_path: Path, seed: int) -> None:
    one_round(programs, whole, url_in(tmp_path, seed), seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2))
def test_the_process_that_measures_latency_is_killed(programs: Programs, tmp_path: Path, seed: int) -> None:
    """In a trial it is measured again; before the first trial the search ends with one line, and is run again."""
    study, chance = measured_study(tmp_path), random.Random(seed)
    program = programs.start("search", study, "--quiet", "--storage", tmp_path / "whole.db")
    assert program.wait(600) == 0, program.log.read_text()
    url, before, kills = f"sqlite:///{tmp_path / 's.db'}", dict[int, Ended](), 0
    for _ in range(40):
        program = programs.start("search", study, "--quiet", "--storage", url)
        while program.poll() is None:
            time.sleep(chance.uniform(0.3, 4))
            for process in measuring(program):
                process.kill()
                kills += 1
        now = seen(url)
        assert {number: now[number] for number in before} == before
        before = now
        if program.code == 0:
            break
        assert program.log.read_text().strip().splitlines()[-1].startswith("rankopt: error: "), program.log.read_text()
    assert program.code == 0
    assert kills
    check(url, before, 8)
    if all(e.state != "FAIL" for e in before.values()):
        assert front_of(url) == front_of(f"sqlite:///{tmp_path / 'whole.db'}")
