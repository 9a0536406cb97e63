"""Several drivers on one study in PostgreSQL or MySQL: no plan twice, nothing lost, and each learns from the other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mariadb_server
import postgres
import pytest
from programs import Ended, Programs, check, seen, small_study, trials_of
from test_loop import loop_on
from test_study import measure

from rankopt import ledger
from rankopt.executors.local import Local
from rankopt.plan import Plan
from rankopt.status import read_status
from rankopt.storages import alone, open_storage, shared

SERVERS = {"postgresql": postgres, "mysql": mariadb_server}
TRIALS = 16


@pytest.fixture(scope="module", params=SERVERS)
def new(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Makes a database on a server, and gives its URL."""
    kind = SERVERS[request.param]
    if why_not := kind.why_not():
        pytest.skip(why_not)
    with kind.server() as url:
        yield lambda name: kind.create(url, name)


@pytest.fixture
def url(new: Callable[[str], str], request: pytest.FixtureRequest) -> str:
    return new(request.node.name.partition("[")[0][-40:])


def drivers(url: str) -> dict[int, list[int]]:
    """Process → the trials that it carried out."""
    found: dict[int, list[int]] = {}
    for trial in trials_of(url):
        if ledger.counts(trial):
            found.setdefault(trial.user_attrs["worker"]["pid"], []).append(trial.number)
    return found


def test_two_drivers_at_once(programs: Programs, url: str, tmp_path: Path) -> None:
    """Begun in the same moment on an empty database, which has no tables yet."""
    study = small_study(tmp_path, 0.05, trials=TRIALS)
    both = [programs.start("search", study, "--quiet", "--storage", url) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0], [p.log.read_text() for p in both]
    check(url, {}, TRIALS)
    by = drivers(url)
    assert set(by) == {p.pid for p in both}
    assert all(len(numbers) >= 3 for numbers in by.values())  # they took turns


def test_one_of_two_drivers_is_killed_and_the_other_runs_what_it_left(
    programs: Programs, url: str, tmp_path: Path
) -> None:
    study = small_study(tmp_path, 0.1, trials=TRIALS)
    one, other = (programs.start("search", study, "--quiet", "--storage", url) for _ in range(2))
    before: dict[int, Ended] = {}
    end = time.monotonic() + 100
    while len(before) < 8 and time.monotonic() < end:
        time.sleep(0.02)
        before = seen(url)
    one.kill()
    before = seen(url)
    assert other.wait() == 0, other.log.read_text()
    check(url, before, TRIALS)
    interrupted = [t for t in trials_of(url) if not ledger.counts(t)]
    assert all(t.user_attrs["worker"]["pid"] == one.pid for t in interrupted)  # the living one's were left alone
    ended = {Plan.from_dict(t.user_attrs["plan"]).digest for t in trials_of(url) if ledger.counts(t)}
    assert {Plan.from_dict(t.user_attrs["plan"]).digest for t in interrupted} <= ended


def test_a_driver_sees_what_the_other_measured_and_does_not_measure_it(url: str) -> None:
    a, b = loop_on(url, 30), loop_on(url, 30)
    first = a.ask()
    assert first is not None
    second = b.ask()  # while the first one runs
    assert second is not None
    assert second.proposal.plan != first.proposal.plan
    assert (a.asked, b.asked) == (1, 2)
    a.tell(first, a.outcome(first, measure))
    third = b.ask()
    assert third is not None
    assert first.proposal.plan.digest in b.measured
    assert b.done == 1
    b.tell(second, "broken")
    b.tell(third, b.outcome(third, measure))
    fourth = a.ask()
    assert fourth is not None
    assert a.done == 3
    assert third.proposal.plan.digest in a.measured
    assert a.standing_at().done == 3


def test_the_last_trials_are_waited_for_and_taken_over_when_their_driver_dies(url: str) -> None:
    a, b = loop_on(url, 2), loop_on(url, 2)
    first, second = a.ask(), b.ask()
    assert first is not None
    assert second is not None
    a.tell(first, a.outcome(first, measure))
    assert a.ask() is None  # all are done or under way
    assert not a.finished  # but the other driver may die
    b.close()
    third = a.ask()
    assert third is not None
    assert third.proposal == second.proposal
    a.tell(third, a.outcome(third, measure))
    assert a.finished
    b.tell(second, b.outcome(second, measure))  # it comes back to life: too late
    assert [t.state.name for t in trials_of(url, "s")] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_many_drivers_in_threads(url: str) -> None:
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            Local().run(loop_on(url, 24), measure, lambda: None)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    check(url, {}, 24, "s")


def test_only_one_holds_off_the_others(url: str) -> None:
    storages = [open_storage(url), open_storage(url)]
    assert all(map(shared, storages))
    order: list[str] = []

    def wait() -> None:
        with alone(storages[1], "s"):
            order.append("second")

    with alone(storages[0], "s"):
        thread = threading.Thread(target=wait)
        thread.start()
        with alone(storages[1], "another study"):
            pass
        time.sleep(0.2)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_status_of_two_drivers(url: str) -> None:
    a, b = loop_on(url, 9), loop_on(url, 9)
    asked = [a.ask(), b.ask(), b.ask()]
    assert asked[0] is not None
    a.tell(asked[0], "ValueError: no luck")
    b.close()
    found = read_status(url, "s")
    assert found.failed == {0: "ValueError: no luck"}
    assert [(r.trial, r.alive) for r in found.running] == [(1, False), (2, False)]
    assert found.workers == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_drivers_come_and_go(programs: Programs, new: Callable[[str], str], tmp_path: Path, seed: int) -> None:
    url = new(f"round{seed}")
    study, chance = small_study(tmp_path, 0.05, trials=TRIALS), random.Random(seed)
    before: dict[int, Ended] = {}
    for _ in range(2):
        some = [programs.start("search", study, "--quiet", "--storage", url) for _ in range(2)]
        time.sleep(chance.uniform(0.5, 4))
        some[0].kill()
        now = seen(url)
        assert {number: now[number] for number in before} == before
        before = now
        some[1].kill()
    last = [programs.start("search", study, "--quiet", "--storage", url) for _ in range(2)]
    assert [p.wait() for p in last] == [0, 0], [p.log.read_text() for p in last]
    check(url, before, TRIALS)
