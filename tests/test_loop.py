"""Several trials under way at once: what is proposed, counted and recorded, in whatever order they end."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_space import made
from test_study import DENSE, FACTS, LIMITS, counted, measure, proposals, search, trials_of

from rankopt import interrupts, ledger
from rankopt.errors import KilledError, RankoptError
from rankopt.evaluate import Evaluation
from rankopt.executors.local import Local
from rankopt.limits import parse_limit
from rankopt.loop import Asked, Loop
from rankopt.plan import Plan
from rankopt.stopping import Stopping
from rankopt.storages import open_storage
from rankopt.strategies import STRATEGIES
from rankopt.strategies.strategy import Setting


def loop_on(
    url: str | None = None, trials: int = 20, by: str = "auto", seed: int = 0, stopping: Stopping | None = None
) -> Loop:
    opened = ledger.open_study(open_storage(url), "s", ("kl", "macs"), FACTS, DENSE, LIMITS)
    setting = Setting(made({"macs": 0.6}), ("kl", "macs"), LIMITS, DENSE, trials, seed)
    return Loop(opened, setting, by, stopping or Stopping())


def outcome(loop: Loop, asked: Asked) -> Evaluation | str:
    return loop.outcome(asked, measure)


def carried_out(loop: Loop, at_once: int, chance: random.Random, fails: float = 0.0) -> None:
    """As an executor with so many workers does it, with results in any order."""
    while not loop.finished:
        while len(loop.pending) < at_once and (asked := loop.ask()) is not None:
            assert loop.asked == loop.done + len(loop.pending)
        asked = chance.choice(list(loop.pending.values()))
        loop.tell(asked, "bad luck" if chance.random() < fails else outcome(loop, asked))


def digests(loop: Loop) -> list[str]:
    frozen = loop.study.get_trials(deepcopy=False)
    return [Plan.from_dict(t.user_attrs["plan"]).digest for t in frozen if "same_as" not in t.user_attrs]


@pytest.mark.parametrize("by", sorted(set(STRATEGIES) - {"energy", "vbmf"}))  # these need more than made-up layers
def test_what_is_under_way_is_not_proposed_again(by: str) -> None:
    loop = loop_on(trials=24, by=by)
    chance = random.Random(3)
    while not loop.finished:
        while len(loop.pending) < 6 and (asked := loop.ask()) is not None:
            under_way = [a.proposal.plan.digest for a in loop.pending.values() if a.known is None]
            assert len(set(under_way)) == len(under_way)
            if asked.known is not None:
                assert asked.known.plan.digest == asked.proposal.plan.digest
        if loop.finished:
            break
        asked = chance.choice(list(loop.pending.values()))
        loop.tell(asked, outcome(loop, asked))
    assert loop.done == 24 or (by == "uniform" and loop.done > 16)  # has no more
    found = digests(loop)
    assert len(set(found)) == len(found)


@settings(max_examples=12)
@given(at_once=st.integers(1, 9), seed=st.integers(0, 99), trials=st.integers(1, 26))
def test_any_order_gives_exactly_the_trials_that_are_wanted(at_once: int, seed: int, trials: int) -> None:
    loop = loop_on(trials=trials)
    carried_out(loop, at_once, random.Random(seed), fails=0.15)
    frozen = loop.study.get_trials(deepcopy=False)
    assert len(frozen) == loop.done == trials
    assert all(t.state.is_finished() for t in frozen)
    assert all(t.user_attrs.get("reason") for t in frozen if t.state.name != "COMPLETE")
    for trial in frozen:
        if trial.state.name == "COMPLETE":
            plan = Plan.from_dict(trial.user_attrs["plan"])
            assert trial.values == [measure(plan).measurements[q] for q in ("kl", "macs")]
    assert {e.trial for e in loop.measured.values()} <= {t.number for t in frozen if t.state.name == "COMPLETE"}


def test_one_at_a_time_it_is_the_same_as_ever(tmp_path: Path) -> None:
    search(str(tmp_path / "a.log"), 16)
    carried_out(loop_on(str(tmp_path / "b.log"), 16), 1, random.Random(0))
    assert proposals(str(tmp_path / "a.log")) == proposals(str(tmp_path / "b.log"))


def test_a_study_that_was_killed_with_trials_under_way(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url, 20)
    for _ in range(7):
        loop.ask()
    for asked in list(loop.pending.values())[2:5]:
        loop.tell(asked, outcome(loop, asked))
    left = [a.proposal.plan.digest for a in loop.pending.values()]
    assert len(left) == 4
    loop.close()  # as if it had been killed

    again = loop_on(url, 20)
    assert (again.done, again.asked) == (3, 3)
    first = [again.ask() for _ in range(4)]
    assert [a.proposal.plan.digest for a in first if a is not None] == left
    carried_out(again, 5, random.Random(1))
    assert len(counted(url)) == 20
    assert sum(t.user_attrs.get("reason") == "interrupted" for t in trials_of(url)) == 4
    plans = [Plan.from_dict(t.user_attrs["plan"]).digest for t in counted(url) if "same_as" not in t.user_attrs]
    assert len(set(plans)) == len(plans)
    assert set(left) <= set(plans)
    third = loop_on(url, 24)
    asked = third.ask()
    assert asked is not None
    assert asked.proposal.plan.digest not in left  # they were run again once


def test_a_strategy_that_knows_nothing_else_than_a_plan_that_was_given_up_ends(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url)
    asked = loop.ask()
    assert asked is not None
    loop.tell(asked, "no")
    loop.trials.given_up.add(asked.proposal.plan.digest)
    loop.strategy.propose = lambda standing: asked.proposal  # type: ignore[method-assign]
    assert loop.ask() is None
    assert loop.finished


def test_a_given_plan_is_measured_though_something_interrupted_comes_first(tmp_path: Path) -> None:
    url, space = str(tmp_path / "s.db"), made({"macs": 0.6})
    loop = loop_on(url)
    cut_off = loop.ask()
    assert cut_off is not None
    loop.close()
    start = [space.solve(space.losses, share) for share in (0.31, 0.47)]
    opened = ledger.open_study(open_storage(url), "s", ("kl", "macs"), FACTS, DENSE, LIMITS)
    again = Loop(opened, Setting(space, ("kl", "macs"), LIMITS, DENSE, 20, start=start))
    found = []
    for _ in range(4):
        asked = again.ask()
        assert asked is not None
        found.append(asked.proposal.plan.digest)
        again.tell(asked, outcome(again, asked))
    assert found[:3] == [cut_off.proposal.plan.digest, *(plan.digest for plan in start)]
    assert len(set(found)) == 4


def test_the_same_plan_again_also_under_other_limits(tmp_path: Path) -> None:
    """What was under way is run to its end, though the strategy would propose something else now."""
    url = str(tmp_path / "s.db")
    loop = loop_on(url)
    asked = loop.ask()
    assert asked is not None
    loop.close()
    limits = [parse_limit("macs<=30%")]
    opened = ledger.open_study(open_storage(url), "s", ("kl", "macs"), FACTS, DENSE, limits)
    again = Loop(opened, Setting(made({"macs": 0.3}), ("kl", "macs"), limits, DENSE, 20))
    second = again.ask()
    assert second is not None
    assert second.proposal == asked.proposal


def test_a_trial_whose_worker_died_is_begun_again_and_given_up_at_last(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url)
    asked = loop.ask()
    other = loop.ask()
    assert asked is not None
    assert other is not None
    for n in (1, 2):
        again = loop.retry(asked, f"node {n} is gone")
        assert again is not None
        assert again.trial is asked.trial
        asked = again
    assert loop.asked == 2
    assert trials_of(url)[0].user_attrs["died"] == ["node 1 is gone", "node 2 is gone"]
    loop.tell(other, outcome(loop, other))
    assert loop.retry(asked, "node 3 is gone") is None
    failed = trials_of(url)[0]
    assert (failed.state.name, failed.user_attrs["reason"]) == ("FAIL", "its worker died 3 times: node 3 is gone")
    assert (loop.done, loop.asked) == (2, 2)
    loop.tell(ok := loop.ask() or asked, outcome(loop, ok))
    assert trials_of(url)[2].state.name == "COMPLETE"


def test_interrupting_marks_all_that_is_under_way(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")
    loop = loop_on(url)
    plans = [a.proposal.plan.digest for _ in range(3) if (a := loop.ask()) is not None]
    loop.interrupt()
    assert [(t.state.name, t.user_attrs["reason"]) for t in trials_of(url)] == [("FAIL", "interrupted")] * 3
    again = loop_on(url)
    wanted = [a.proposal.plan.digest for _ in range(3) if (a := again.ask()) is not None]
    assert wanted == plans


@pytest.mark.parametrize("doing", ["create_new_trial", "set_trial_state_values"])
def test_ctrl_c_while_a_trial_is_written_down_leaves_none_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    url, calls = str(tmp_path / "s.log"), itertools.count()
    loop = loop_on(url, trials=6)
    storage = type(loop.study._storage)
    real = getattr(storage, doing)

    def interrupted(*args: Any, **given: Any) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **given)

    monkeypatch.setattr(storage, doing, interrupted)

    def run() -> None:
        with interrupts.handled():
            try:
                Local().run(loop, measure, lambda: None)
            finally:
                loop.interrupt()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert {t.state.name for t in trials_of(url)} <= {"COMPLETE", "FAIL"}
    again = loop_on(url, trials=6)
    Local().run(again, measure, lambda: None)
    assert again.done == 6
    assert len(set(digests(again))) == 6


def test_a_plan_that_kills_its_process_again_and_again_is_given_up(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    for _ in range(3):
        loop = loop_on(url)
        asked = loop.ask()
        assert asked is not None
        loop.close()
    last = loop_on(url)
    assert last.done == 1
    reasons = [t.user_attrs["reason"] for t in trials_of(url)]
    assert reasons == ["interrupted", "interrupted", "its process was killed, 3 times; out of memory?"]
    other = last.ask()
    assert other is not None
    assert other.proposal.plan != asked.proposal.plan


def test_what_comes_from_a_trial_that_was_taken_for_dead_is_dropped(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url)
    asked = loop.ask()
    assert asked is not None
    opened = optuna.load_study(study_name="s", storage=open_storage(url))
    ledger.finish(opened, trials_of(url)[0]._trial_id, optuna.trial.TrialState.FAIL, {"reason": "interrupted"})
    loop.tell(asked, outcome(loop, asked))
    assert (loop.done, loop.pending) == (0, {})
    assert trials_of(url)[0].state.name == "FAIL"
    assert "measurements" not in trials_of(url)[0].user_attrs


def test_everything_about_a_trial_is_in_it(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url, seed=5)
    first, second = loop.ask(), loop.ask()
    assert first is not None
    assert second is not None
    loop.tell(first, outcome(loop, first))
    loop.tell(second, outcome(loop, second), {"host": "pi4", "processor": "BCM2711"})
    here, there = trials_of(url)[:2]
    assert here.user_attrs["environment"]["seed"] == 5
    assert set(here.user_attrs["environment"]) >= {"host", "processor", "python", "torch", "optuna"}
    assert there.user_attrs["environment"] == {"seed": 5, "host": "pi4", "processor": "BCM2711"}
    assert here.user_attrs["worker"]["pid"] > 0
    assert here.user_attrs["heartbeat"] > 1.7e9
    assert here.duration is not None
    assert Plan.from_dict(here.user_attrs["plan"]) == first.proposal.plan


def test_eight_failures_in_a_row_in_whatever_order_end_it() -> None:
    loop = loop_on(trials=40)
    asked = [loop.ask() for _ in range(8)]
    for one in reversed(asked):
        assert one is not None
        loop.tell(one, "broken")
    with pytest.raises(RankoptError, match="8 trials failed in a row; the last: trial 0: broken"):
        loop.ask()


# the local executor --------------------------------------------------------------------------------------------------


def hanging(at: int) -> Callable[..., Evaluation]:
    calls = 0

    def evaluate(plan: Plan, limits: Any, *_: Any) -> Evaluation:
        nonlocal calls
        calls += 1
        try:
            while calls == at:
                pass
        except Exception:  # what user code often does
            raise AssertionError from None
        return measure(plan, limits)

    return evaluate


def test_a_trial_that_hangs_is_given_up_and_the_study_goes_on() -> None:
    loop = loop_on(trials=6)
    Local(trial_timeout=0.2).run(loop, hanging(3), lambda: None)
    states = [t.state.name for t in loop.study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert loop.study.get_trials()[2].user_attrs["reason"] == "took longer than 0.2 s, the time limit of a trial"


def test_a_process_that_measures_and_is_killed_is_tried_again() -> None:
    calls: dict[str, int] = {}

    def evaluate(plan: Plan, limits: Any, *_: Any) -> Evaluation:
        calls[plan.digest] = calls.get(plan.digest, 0) + 1
        if len(calls) == 2 and calls[plan.digest] == 1:
            raise KilledError("the process that ran the model was killed")
        if len(calls) == 4:
            raise KilledError("no memory")
        return measure(plan, limits)

    loop = loop_on(trials=5, by="solved")
    Local().run(loop, evaluate, lambda: None)
    assert list(calls.values()) == [1, 2, 1, 3, 1]
    trials = loop.study.get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["died"] == ["the process that ran the model was killed"]
    assert trials[3].user_attrs["reason"] == "its worker died 3 times: no memory"


def test_memory_that_can_not_be_had_fails_the_trial_alone() -> None:
    loop = loop_on(trials=4)

    def evaluate(plan: Plan, limits: Any, *_: Any) -> Evaluation:
        if loop.done == 1:
            bytearray(1 << 62)
        return measure(plan, limits)

    Local().run(loop, evaluate, lambda: None)
    trials = loop.study.get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].user_attrs["reason"].startswith("MemoryError")


# stopping ------------------------------------------------------------------------------------------------------------


def test_no_gain_for_some_trials_ends_it(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    loop = loop_on(url, 200, stopping=Stopping(patience=6))
    volumes: list[float] = []

    def ever_worse(plan: Plan, limits: Any, *_: Any) -> Evaluation:
        found = measure(plan, limits)
        found.measurements["kl"] += 5.0 * (loop.done > 8)
        return found

    Local().run(loop, ever_worse, lambda: volumes.append(float(loop.standing_at().hypervolume or 0)))
    assert loop.stopped == "stopped: no gain in hypervolume for 6 trials"
    assert 6 < loop.done <= 15
    assert len(set(volumes[-7:])) == 1  # the last gain, and six trials that brought none
    grown = [n for n, v in enumerate(volumes[1:], 1) if v > volumes[n - 1]]
    assert all(b - a <= 6 for a, b in itertools.pairwise(grown))
    again = loop_on(url, 200, stopping=Stopping(patience=6))
    assert again.ask() is None  # it knows from what is recorded
    assert again.finished
    more = loop_on(url, 200, stopping=Stopping(patience=8))
    assert more.ask() is not None


def test_the_time_limit_counts_all_runs_together(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")

    def slow(plan: Plan, limits: Any, *_: Any) -> Evaluation:
        time.sleep(0.05)
        return measure(plan, limits)

    loop = loop_on(url, 500, stopping=Stopping(time_limit=0.6))
    Local().run(loop, slow, lambda: None)
    assert loop.stopped == "stopped: the time limit of 0.6 s is over"
    assert 1 <= loop.done <= 12
    assert all(t.state.is_finished() for t in trials_of(url))
    again = loop_on(url, 500, stopping=Stopping(time_limit=0.3))
    assert again.ask() is None
    longer = loop_on(url, 500, stopping=Stopping(time_limit=1.6))
    Local().run(longer, slow, lambda: None)
    assert longer.done > again.done
    assert longer.done <= 1.6 / 0.05 + 2  # not those of 0.6 s and of another 1.6
