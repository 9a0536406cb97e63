"""The correction against coefficients that are known, and its error against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.latency_fit import Array, PredictionError, fitted, left_out


def rows(plans: int, methods: int, seed: int = 0) -> Array:
    """Features of the dense model and of random plans, as `PlanLatency` makes them."""
    random = np.random.default_rng(seed)
    parts = random.dirichlet(np.ones(methods + 1), plans) * random.uniform(0.2, 1, (plans, 1))
    found = np.column_stack([parts.sum(1), random.uniform(0.1, 1, plans), np.ones(plans), parts[:, :methods]])
    return np.vstack([[1.0, 1.0, 1.0] + [0.0] * methods, found])


TRUE = np.array([0.8, 0.12, 0.08, 0.15, -0.1])


def test_known_coefficients_are_found() -> None:
    given = rows(40, 2)
    found = fitted(given, given @ TRUE)
    assert found == pytest.approx(TRUE, abs=0.02)
    assert given @ found == pytest.approx(given @ TRUE, rel=0.01)


def test_a_table_that_is_right_is_left_as_it_is() -> None:
    given = rows(12, 3)
    assert fitted(given, given[:, 0]) == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-3)


def test_with_few_plans_it_stays_near_the_table() -> None:
    given = rows(1, 3)
    assert fitted(given, given[:, 0] * 1.05) == pytest.approx([1, 0, 0, 0, 0, 0], abs=0.25)
    assert fitted(given[:1], np.ones(1)) == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-3)


def test_the_dense_model_is_predicted_to_take_what_it_takes() -> None:
    """Even where the plans alone would have it otherwise: their layers all cost a tenth more in place."""
    given = rows(30, 2)
    kept = given @ TRUE * 1.1
    kept[0] = 1.0
    assert float(fitted(given, kept) @ given[0]) == pytest.approx(1, abs=1e-3)


def test_a_batch_beside_a_slow_dense_run_does_not_bend_the_fit() -> None:
    """Six of thirty plans came out a fifth too fast together; least squares would be off by several percent."""
    given = rows(30, 2)
    kept = given @ TRUE * np.random.default_rng(2).normal(1, 0.01, len(given))
    kept[-6:] *= 0.8
    others = rows(50, 2, 5)[1:]
    miss = np.abs(others @ fitted(given, kept) / (others @ TRUE) - 1)
    squares = np.abs(others @ np.linalg.lstsq(given / kept[:, None], np.ones(len(kept)))[0] / (others @ TRUE) - 1)
    assert np.median(miss) < 0.015
    assert np.median(squares) > 2 * np.median(miss)


def test_errors_are_relative() -> None:
    """Of two plans that can't both be met, the fast one is met as well as the slow one."""
    given = np.array([[1.0, 1.0, 1.0], [0.1, 0.5, 1.0], [0.1, 0.5, 1.0]])
    found = float((fitted(given, np.array([1.0, 0.2, 0.1])) @ given.T)[1])
    assert 0.1 < found < 0.15  # the mean of the relative errors, not 0.15


@settings(max_examples=60, derandomize=True)
@given(plans=st.integers(0, 30), methods=st.integers(0, 5), seed=st.integers(0, 1000), sign=st.sampled_from([-1, 1]))
def test_more_time_or_larger_weights_never_make_a_plan_faster(plans: int, methods: int, seed: int, sign: int) -> None:
    """Even where measurements say so, which are noise then."""
    given = rows(plans, methods, seed)
    random = np.random.default_rng(seed)
    kept = np.clip(1 + sign * given[:, 1] * random.normal(1, 1, len(given)), 0.05, 3)
    found = fitted(given, kept)
    assert np.isfinite(found).all()
    assert found[0] > 0
    assert found[1] >= 0
    assert (found[0] + found[3:] > 0).all()


@pytest.mark.parametrize("methods", [0, 2])
def test_the_error_is_that_of_plans_left_out(methods: int) -> None:
    given = rows(9, methods, 3)
    kept = given @ np.array([0.9, 0.1, 0.05, 0.1, 0.2][: 3 + methods]) * np.random.default_rng(1).normal(1, 0.05, 10)
    misses = []
    for out in range(1, len(given)):
        part = fitted(np.delete(given, out, 0), np.delete(kept, out))
        misses.append(abs(sum(part[i] * given[out, i] for i in range(len(part))) - kept[out]) / kept[out])
    found = left_out(given, kept)
    assert found is not None
    assert found.plans == 9
    assert found.median == pytest.approx(np.median(misses))
    assert found.p95 == pytest.approx(np.quantile(misses, 0.95))
    assert found.median < 0.15


def test_the_error_of_too_few_plans_is_not_known() -> None:
    given = rows(3, 1)
    assert left_out(given, given[:, 0]) is None
    given = rows(4, 1)
    assert left_out(given, given[:, 0]) == PredictionError(pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-3), 4)


def test_it_is_said_in_percent() -> None:
    text = str(PredictionError(0.0213, 0.081, 12))
    assert text == "median 2.1%, 95th percentile 8.1%, over 12 plans left out of the fit"
