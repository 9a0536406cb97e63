"""What the Ray executor decides, with workers that are made up: plans in flight, deaths, retries, in any order."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from parted import Parted
from test_space import made
from test_study import DENSE, FACTS, LIMITS

from rankopt import ledger
from rankopt.errors import InputError, KilledError, RankoptError
from rankopt.executors.carrying import Carrying
from rankopt.executors.deaths import cause_of
from rankopt.executors.local import Local
from rankopt.executors.worker import carried_out, order
from rankopt.loop import Asked, Loop
from rankopt.machine import device_lock, working
from rankopt.plan import Plan
from rankopt.storages import open_storage
from rankopt.strategies.strategy import Setting


def loop_of(trials: int = 12, url: str | None = None, seed: int = 0, limits: Sequence[Any] = LIMITS) -> Loop:
    opened = ledger.open_study(open_storage(url), "s", ("kl", "macs"), FACTS, DENSE, limits)
    bounds = {li.quantity: li.bound(DENSE) / DENSE[li.quantity] for li in limits if li.quantity in ("macs", "params")}
    return Loop(opened, Setting(made(bounds), ("kl", "macs"), limits, DENSE, trials, seed))


def trials_of(loop: Loop) -> list[optuna.trial.FrozenTrial]:
    return loop.study.get_trials(deepcopy=False)


class Workers:
    """Some workers whose turn it is by chance; `fate` says what becomes of a plan: "", "killed", or why it failed."""

    def __init__(self, loop: Loop, evaluate: Any, room: int, fate: Callable[[Asked], str] = lambda asked: "") -> None:
        self.told = 0
        self.carrying = Carrying(loop, evaluate, self._told, lambda: room, None)
        self.loop, self.evaluate, self.room, self.fate = loop, evaluate, room, fate
        self.busy: dict[str, Asked] = {}
        self.most = 0

    def _told(self) -> None:
        self.told += 1

    def run(self, chance: random.Random) -> None:
        names = iter(range(10_000))
        with self.carrying.open():
            while True:
                while (asked := self.carrying.next()) is not None:
                    name = str(next(names))
                    self.carrying.takes(name, asked)
                    self.carrying.started(name)
                    self.busy[name] = asked
                    self.most = max(self.most, len(self.busy))
                if not self.busy:
                    assert self.loop.finished
                    return
                self._end(chance.choice(sorted(self.busy)))

    def _end(self, name: str) -> None:
        asked = self.busy.pop(name)
        fate = self.fate(asked)
        if fate == "killed":
            self.carrying.died(name, "The actor died: worker process has died, SIGKILL")
            self.carrying.ended(name, None)
        elif fate:
            self.carrying.ended(name, json.dumps({"failed": fate, "seconds": 1.0, "ran": {}}))
        else:
            text = order(asked.trial.number, asked.proposal.plan)
            self.carrying.ended(name, carried_out(self.evaluate.travelling(), text, None, "a node"))


# asking and telling --------------------------------------------------------------------------------------------------


def test_one_worker_is_the_local_executor() -> None:
    local, workers = loop_of(), loop_of()
    Local().run(local, Parted(), lambda: None)
    carried = Workers(workers, Parted(), room=1)
    carried.run(random.Random(0))
    assert [t.values for t in trials_of(local)] == [t.values for t in trials_of(workers)]
    assert [t.user_attrs["plan"] for t in trials_of(local)] == [t.user_attrs["plan"] for t in trials_of(workers)]
    assert carried.told == 12


def test_the_same_order_of_results_gives_the_same_plans_and_another_one_others() -> None:
    plans = []
    for chance in (1, 1, 2):
        loop = loop_of(20)
        Workers(loop, Parted(), room=4).run(random.Random(chance))
        plans.append([t.user_attrs["plan"] for t in trials_of(loop)])
    assert plans[0] == plans[1] != plans[2]


@settings(max_examples=12, deadline=None)
@given(chance=st.integers(0, 1000), room=st.integers(1, 5), killed=st.integers(0, 60), failed=st.integers(0, 30))
def test_every_trial_ends_once_whatever_happens_to_workers(chance: int, room: int, killed: int, failed: int) -> None:
    fates = random.Random(chance)

    def fate(asked: Asked) -> str:
        draw = fates.uniform(0, 100)
        return "killed" if draw < killed else "no luck" if draw < killed + failed else ""

    loop = loop_of(10)
    workers = Workers(loop, Parted(), room, fate)
    try:
        workers.run(fates)
    except RankoptError as error:
        assert "8 trials failed in a row" in str(error)  # noqa: PT017
        return
    assert workers.told == 10
    assert workers.most <= room
    assert [t.number for t in trials_of(loop)] == list(range(10))
    for trial in trials_of(loop):
        assert trial.state != TrialState.RUNNING
        assert trial.state == TrialState.COMPLETE or trial.user_attrs["reason"]
        assert len(trial.user_attrs.get("died", [])) <= 2
    plans = [json.dumps(t.user_attrs["plan"]) for t in trials_of(loop) if t.state == TrialState.COMPLETE]
    assert len(set(plans)) == len(plans)


def test_a_plan_that_kills_every_worker_is_given_up() -> None:
    loop = loop_of(6)
    Workers(loop, Parted(), 2, lambda asked: "killed" if asked.trial.number == 3 else "").run(random.Random(0))
    states = [t.state for t in trials_of(loop)]
    assert states.count(TrialState.FAIL) == 1
    assert states[3] == TrialState.FAIL
    reason = trials_of(loop)[3].user_attrs["reason"]
    assert reason == "its worker died 3 times: its worker process was killed or crashed; out of memory?"


def test_too_many_failures_in_a_row_end_the_study_with_the_reason() -> None:
    with pytest.raises(RankoptError, match="8 trials failed in a row; the last: trial 7: no luck"):
        Workers(loop_of(30), Parted(), 1, lambda asked: "no luck").run(random.Random(0))


def test_what_breaks_a_limit_needs_no_worker() -> None:
    loop, parted = loop_of(12), Parted()
    parted.early = lambda plan, limits: parted(plan, limits, known={"kl": 1.0})  # type: ignore[method-assign]
    workers = Workers(loop, parted, 2, lambda asked: pytest.fail("a worker was asked"))
    workers.run(random.Random(0))
    assert workers.told == 12


# what is measured on devices -----------------------------------------------------------------------------------------


class Far:
    """Devices on other machines, as far as `Carrying` knows them; `fails` says what measuring raises, by its number."""

    elsewhere = True

    def __init__(self, fails: dict[int, Exception] | None = None, seconds: float = 0.0) -> None:
        self.fails, self.seconds, self.begun, self.at_once, self.most = fails or {}, seconds, 0, 0, 0
        self.kept: list[str] = []
        self.thread: set[str] = set()

    @property
    def nodes(self) -> dict[str, str]:
        return {"pi": "node-7"}

    def unwanted(self, so: bool) -> None:
        return

    def apart(self, plan: Plan) -> list[dict[str, Any]]:
        number, self.begun = self.begun, self.begun + 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.thread.add(threading.current_thread().name)
        time.sleep(self.seconds)
        self.at_once -= 1
        if number in self.fails:
            raise self.fails[number]
        return [{plan.digest: 1.0}]

    def keep(self, plan: Plan, found: Any) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.kept.append(plan.digest)


class OnDevice(Parted):
    """Plans whose kl is below the median go on to the device."""

    def __init__(self, devices: Far, best: float = 1e9) -> None:
        super().__init__()
        self.devices, self.best = devices, best

    def to_measure(self, plan: Plan, limits: Any, worth: Any, known: Any) -> bool:
        return bool(known["kl"] < self.best)


def test_devices_are_asked_one_plan_at_a_time_beside_the_workers() -> None:
    loop, far = loop_of(10), Far(seconds=0.01)
    Workers(loop, OnDevice(far), room=4).run(random.Random(0))
    assert far.begun == 10
    assert far.most == 1
    assert far.thread == {"rankopt measuring"}
    assert {t.state for t in trials_of(loop)} == {TrialState.COMPLETE}
    assert sorted(far.kept) == sorted({Plan.from_dict(t.user_attrs["plan"], "").digest for t in trials_of(loop)})
    for trial in trials_of(loop):
        where = trial.user_attrs["environment"]
        assert where["measured_on@pi"] == "node-7"
        assert (where["node"], where["pid"]) == ("a node", str(os.getpid()))


def test_no_more_plans_wait_for_a_slow_device_than_there_are_workers() -> None:
    loop, most = loop_of(12), 0
    far = Far(seconds=0.02)
    workers = Workers(loop, OnDevice(far), room=3)
    keep, far.keep = far.keep, lambda plan, found: seen(plan, found)  # type: ignore[method-assign]

    def seen(plan: Plan, found: Any) -> None:
        nonlocal most
        most = max(most, len(loop.pending))
        keep(plan, found)

    workers.run(random.Random(0))
    assert most <= 5


def test_a_node_that_goes_away_is_asked_again_and_the_quality_is_kept() -> None:
    loop, far = loop_of(6), Far({1: KilledError("the node died"), 4: InputError("can't run it")})
    evaluate = OnDevice(far)
    Workers(loop, evaluate, room=1).run(random.Random(0))
    reasons = [t.user_attrs.get("reason") for t in trials_of(loop)]
    assert [r for r in reasons if r] == ["can't run it"]
    assert [t.user_attrs["died"] for t in trials_of(loop) if "died" in t.user_attrs] == [["the node died"]]
    assert far.begun == 7


def test_a_node_that_stays_away_fails_the_trial_and_not_the_study() -> None:
    far = Far({n: KilledError("no node has it") for n in range(3)})
    loop = loop_of(4)
    Workers(loop, OnDevice(far), room=1).run(random.Random(0))
    reasons = [t.user_attrs["reason"] for t in trials_of(loop) if t.state == TrialState.FAIL]
    assert reasons == ["its worker died 3 times: no node has it"]


# what Ray says of deaths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why", "again"),
    [
        (
            "Worker unexpectedly exits with a connection error code 2. SIGKILL by OOM killer",
            "was killed or crash",
            True,
        ),
        ("The actor died because its node has died. Node Id: 12", "its node went away", True),
        ("Task was killed due to the node running low on memory.", "the node ran out of memory", True),
        (
            "The actor died because of an error raised in its creation task, ray::X.__init__()\n  File 'x'\n"
            "ModuleNotFoundError: No module named 'mine'",
            "a worker can't be made: ModuleNotFoundError: No module named 'mine'",
            False,
        ),
        ("Failure # 1 (occurred at now)\nsomething else\n", "its worker ended: something else", True),
        ("ray::X.train()\n  File 'x'\nAttributeError: no such thing", "ended: AttributeError: no such thing", False),
        ("", "its worker ended: no reason was given", True),
    ],
)
def test_deaths_are_told_on_one_line(text: str, why: str, again: bool) -> None:
    found, other = cause_of(text)
    assert why in found
    assert "\n" not in found
    assert other == again


# trials and measurements on one machine ------------------------------------------------------------------------------


def test_measurements_and_trials_exclude_each_other_on_a_device(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    log: list[str] = []
    begun = threading.Barrier(3)

    def trial(name: str, seconds: float) -> None:
        with working("cpu"):
            log.append(f"{name} begins")
            if seconds:
                begun.wait(5)
            time.sleep(seconds)
            log.append(f"{name} ends")

    def measurement() -> None:
        with device_lock("cpu"):
            log.append("measuring")
            time.sleep(0.2)
            log.append("measured")

    first = [threading.Thread(target=trial, args=(name, 0.3)) for name in ("a", "b")]
    for thread in first:
        thread.start()
    begun.wait(5)  # both at once
    measures = threading.Thread(target=measurement)
    measures.start()
    time.sleep(0.15)
    late = threading.Thread(target=trial, args=("late", 0.0))  # while a measurement waits for a and b
    late.start()
    for thread in (*first, measures, late):
        thread.join(10)
    assert set(log[:2]) == {"a begins", "b begins"}
    assert log[4:] == ["measuring", "measured", "late begins", "late ends"]
    with working("gpu"), device_lock("cpu"):
        pass
