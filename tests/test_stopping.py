"""Durations, the time that trials took, and trials without a gain."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from rankopt.durations import seconds_of
from rankopt.plan import Plan
from rankopt.result import Entry, Result
from rankopt.stopping import Stopping
from rankopt.trials import spent
from rankopt.worth import Gains

START = datetime(2026, 3, 1, 12)


def trial(start: float, end: float | None, **attributes: object) -> FrozenTrial:
    made = create_trial(state=TrialState.FAIL, user_attrs=dict(attributes))
    made.number = int(start * 1000 + (end or 0))
    made.datetime_start = START + timedelta(seconds=start)
    made.datetime_complete = None if end is None else START + timedelta(seconds=end)
    return made


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), (0.5, 0.5), ("90", 90), ("90s", 90), ("20m", 1200), ("20 min", 1200), ("1h30m", 5400), ("2d", 172800)],
)
def test_durations(text: object, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("wrong", ["", "0", 0, -3, "h", "1x", "1h2", "-5m", True, None, float("inf"), "1..5s", [1]])
def test_what_is_no_duration(wrong: object) -> None:
    with pytest.raises(ValueError, match="must be a time above 0 such as 90s, 20m, 2h or 1h30m, got"):
        seconds_of(wrong)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_time_in_which_something_ran_is_that_of_a_clock(spans: list[tuple[int, int]]) -> None:
    ticks = {t for start, length in spans for t in range(start, start + length)}
    assert spent([trial(a, a + length) for a, length in spans]) == len(ticks)


def test_what_a_driver_does_between_its_trials_is_work_too() -> None:
    one, other = {"id": "a"}, {"id": "b"}
    found = [trial(0, 10, worker=one), trial(15, 20, worker=one), trial(100, 110, worker=other), trial(18, 30)]
    assert spent(found) == 30 + 10


def test_an_interrupted_trial_ran_until_it_was_heard_of_last() -> None:
    heard = (START + timedelta(seconds=40)).timestamp()
    interrupted = trial(10, 99999, reason="interrupted", heartbeat=heard)
    assert spent([interrupted]) == 30
    assert spent([trial(10, None, heartbeat=heard)]) == 30  # one that runs
    assert spent([trial(10, 99999, reason="interrupted")]) == 0
    assert spent([trial(10, 20, reason="ValueError")]) == 10


def test_which_rule_says_so() -> None:
    assert Stopping().why(1e9, 10**9) == ""
    assert Stopping(time_limit=10).why(9.9, 50) == ""
    assert Stopping(time_limit=10).why(10, 0) == "stopped: the time limit of 10 s is over"
    assert Stopping(patience=3).why(1e9, 2) == ""
    assert Stopping(patience=3).why(0, 3) == "stopped: no gain in hypervolume for 3 trials"


def test_gains_are_those_of_the_plans_within_the_limits_once_there_are_some() -> None:
    gains = Gains(Result([], ("kl", "macs"), (), {"macs": 100.0}))

    def add(kl: float, macs: float, feasible: bool) -> int:
        gains.add(Entry(0, Plan({}), {"kl": kl, "macs": macs}, feasible))
        return gains.without

    assert add(1.0, 50.0, False) == 0
    assert add(1.1, 60.0, False) == 1
    assert add(0.5, 50.0, False) == 0  # better than the one before
    assert add(2.0, 90.0, True) == 0  # the first one that keeps the limits, however bad
    assert add(0.1, 10.0, False) == 1  # does not count any more
    gains.add(None)
    assert gains.without == 2
    assert add(2.0, 90.0, True) == 3  # the same again
    assert add(1.9, 90.0, True) == 0
