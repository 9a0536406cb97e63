"""Measurements: their summary against plain statistics, their JSON form, and conditions that are not mixed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt.errors import ConditionsError, InputError
from rankopt.measurement import Measurement, _half_width, conditions_digest, same_conditions

ROUNDS = [[1.0, 1.2], [1.1, 1.3], [0.9, 1.1], [1.0, 1.0], [1.2, 1.2], [1.1, 1.1]]


def test_the_summary_is_that_of_all_runs() -> None:
    found = Measurement.of(ROUNDS, {"device": "pi"}, others=0.1)
    runs = np.concatenate(ROUNDS)
    assert (found.value, found.low, found.high) == tuple(np.quantile(runs, [0.5, 0.25, 0.75]))
    assert found.p95 == np.quantile(runs, 0.95)
    assert (found.n, found.unit, found.others, dict(found.conditions)) == (12, "ms", 0.1, {"device": "pi"})
    assert found.kept is None
    assert found.spread == pytest.approx((found.high - found.low) / found.value)


def test_a_drift_that_hits_both_is_not_in_the_ratio() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    reference = [[2.0 * d] * 3 for d in drift]
    found = Measurement.of([[1.0 * d] * 3 for d in drift], {}, reference)
    assert found.kept == pytest.approx(0.5)
    assert (found.kept_low, found.kept_high, found.kept_error) == pytest.approx((0.5, 0.5, 0.0))
    assert found.error > 0.1
    assert Measurement.of(reference, {}, reference).kept == 1


@pytest.mark.parametrize(
    ("rounds", "reference", "text"),
    [
        ([], None, "a round without any"),
        ([[1.0], []], None, "a round without any"),
        ([[1.0, 0.0]], None, "a time of 0"),
        ([[1.0, float("nan")]], None, "a time of nan"),
        ([[1.0, float("inf")]], None, "a time of inf"),
        ([[1.0], [-2.0]], None, "a time of -2"),
        ([[1.0]], [[]], "a round without any"),
        ([[1.0], [1.0]], [[1.0]], "2 rounds can't be compared with 1"),
    ],
)
def test_runs_that_are_no_times_are_refused(rounds: Any, reference: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Measurement.of(rounds, {}, reference)


@given(st.integers(2, 60))
def test_the_interval_is_the_narrowest_that_covers_the_median_with_95_percent(n: int) -> None:
    width = _half_width(np.arange(n, dtype=float) + 100) * 2 * (100 + (n - 1) / 2)
    skipped = round((n - 1 - width) / 2)

    def covered(skip: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(skip + 1)) / 2**n

    assert skipped == 0 or covered(skipped) >= 0.95
    assert covered(skipped + 1) < 0.95


def test_one_round_has_no_interval_and_says_so_in_its_json_form() -> None:
    found = Measurement.of([[1.0, 1.1]], {"a": "b"}, [[2.0, 2.0]])
    assert found.error == found.kept_error == math.inf
    data = found.to_dict()
    assert "error" not in data
    assert "conditions" not in data
    assert Measurement.from_dict(json.loads(json.dumps(data, allow_nan=False)), {"a": "b"}) == found


def test_the_json_form_comes_back_the_same() -> None:
    for reference in (None, ROUNDS):
        found = replace(Measurement.of(ROUNDS, {"x": "y"}, reference), repeats=2)
        assert Measurement.from_dict(json.loads(json.dumps(found.to_dict())), found.conditions) == found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"value": "3"}, r"there: value must be a number above 0, got '3'"),
        ({"value": 0}, "value must be a number above 0"),
        ({"value": True}, "value must be a number above 0"),
        ({"n": 2.5}, r"n must be a whole number, got '2.5'"),
        ({"unit": 3}, "unit must be text"),
        ({"error": float("nan")}, "error must be a number of at least 0"),
        ({"low": -1.0}, "low must be a number of at least 0"),
        ({"speed": 3.0}, "there: needs an object of value, unit"),
        ({"p95": None}, "p95 must be a number of at least 0"),
    ],
)
def test_a_json_form_with_a_fault_is_refused(change: dict[str, Any], text: str) -> None:
    data = {**Measurement.of(ROUNDS, {}).to_dict(), **change}
    with pytest.raises(InputError, match=text):
        Measurement.from_dict(data, where="there")


def test_what_is_missing_is_named() -> None:
    data = Measurement.of(ROUNDS, {}).to_dict()
    del data["p95"]
    with pytest.raises(InputError, match="there: p95 is needed"):
        Measurement.from_dict(data, where="there")
    with pytest.raises(InputError, match="there: needs an object"):
        Measurement.from_dict([1], where="there")


def test_noise_is_told() -> None:
    calm = Measurement.of([[1.0, 1.01, 1.0, 1.01]] * 6, {})
    assert not calm.noisy
    assert calm.noise() == ""
    assert calm.describe() == "1.005 ms (quartiles 1 to 1.01, 24 runs)"
    spread = Measurement.of([[1.0, 2.0, 3.0]] * 6, {})
    assert spread.noisy
    assert "the middle half of the runs spreads over 100% of the median" in spread.describe()
    busy = replace(calm, others=1.5, repeats=1)
    assert busy.noise() == "noisy: other processes kept 1.5 cores busy (after 1 repeats)"


def test_conditions_that_differ_are_not_mixed() -> None:
    same_conditions({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, "there")
    with pytest.raises(ConditionsError, match=r"there: measured with another b \(2, now 3\)"):
        same_conditions({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "there")
    with pytest.raises(ConditionsError, match=r"another b \(none, now 3\)"):
        same_conditions({"a": "1"}, {"a": "1", "b": "3"}, "there")
    assert conditions_digest({"a": "1", "b": "2"}) == conditions_digest({"b": "2", "a": "1"})
    assert conditions_digest({"a": "1"}) != conditions_digest({"a": "2"})
