import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.pareto import front, gains, hypervolume, knee

GRID = 6  # points on a small grid: ties and equal rows are common, and volumes can be counted cell by cell


def points(columns: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, GRID), min_size=columns, max_size=columns)
    return st.lists(row, max_size=9)


@settings(deadline=None)
@given(st.integers(1, 4).flatmap(points))
def test_front_against_every_pair(rows: list[list[int]]) -> None:
    kept = [int(i) for i in front(np.array(rows, dtype=float))] if rows else []

    def dominates(a: list[int], b: list[int]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = {tuple(row) for row in rows if not any(dominates(other, row) for other in rows)}
    assert {tuple(rows[i]) for i in kept} == expected
    assert len(kept) == len(expected)  # equal rows once
    assert all(i == rows.index(rows[i]) for i in kept)  # and of those the first
    assert [rows[i][0] for i in kept] == sorted(rows[i][0] for i in kept)


@settings(deadline=None)
@given(st.integers(1, 4).flatmap(points))
def test_hypervolume_against_counting_cells(rows: list[list[int]]) -> None:
    if not rows:
        assert hypervolume(np.zeros((0, 2)), [1.0, 1.0]) == 0
        return
    m = len(rows[0])
    cells = itertools.product(range(GRID), repeat=m)
    expected = sum(any(all(p <= c for p, c in zip(row, cell, strict=True)) for row in rows) for cell in cells)
    assert hypervolume(np.array(rows, dtype=float), [float(GRID)] * m) == pytest.approx(expected)


@given(points(2).filter(bool))
def test_knee_is_on_the_front(rows: list[list[int]]) -> None:
    assert knee(np.array(rows, dtype=float)) in front(np.array(rows, dtype=float))


def test_knee_of_an_elbow() -> None:
    assert knee([[0.0, 1.0], [0.1, 0.1], [1.0, 0.0]]) == 1
    assert knee([[3.0, 3.0]]) == 0


def test_nan_never_wins() -> None:
    x = np.array([[np.nan, 0.0], [1.0, 1.0], [0.5, np.nan]])
    assert front(x).tolist() == [1]
    assert hypervolume(x, [2.0, 2.0]) == 1
    with pytest.raises(ValueError, match="at least one point"):
        knee([[np.nan, 1.0]])


def test_empty_and_outside_the_reference() -> None:
    assert front([]).tolist() == []
    assert hypervolume([], [1.0, 1.0]) == 0
    assert hypervolume([[1.0, 0.0], [2.0, 2.0]], [1.0, 1.0]) == 0
    assert hypervolume([[-np.inf, 0.0]], [1.0, 1.0]) == np.inf


def test_infinite_points_lose() -> None:
    assert front([[1.0, np.inf], [0.0, 0.0]]).tolist() == [1]


@settings(max_examples=100, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 4), st.floats(0, 1.5)), max_size=8), st.tuples(st.floats(0, 4), st.floats(0, 1.5))
)
def test_gains_are_differences_of_volumes(known: list[tuple[float, float]], point: tuple[float, float]) -> None:
    found = gains([point[0]], [point[1]], known, (3.0, 1.0))
    assert found[0] == pytest.approx(
        hypervolume([*known, point], (3.0, 1.0)) - hypervolume(known, (3.0, 1.0)), abs=1e-9
    )
