"""The allocator against brute force over all combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.allocate import Allocation, Choices, allocate, allocate_front, frontier
from rankopt.errors import InfeasibleError

QUANTITIES = ("macs", "params", "latency")


def brute(groups: list[Choices], limits: dict[str, float]) -> float | None:
    """The least loss of any combination within all limits."""
    best = None
    for picks in itertools.product(*(range(len(g.losses)) for g in groups)):
        costs = {q: sum(float(g.costs[q][p]) for g, p in zip(groups, picks, strict=True)) for q in limits}
        if all(costs[q] <= limits[q] for q in limits):
            loss = sum(float(g.losses[p]) for g, p in zip(groups, picks, strict=True))
            best = loss if best is None else min(best, loss)
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Choices], dict[str, float]]:
    """One to four groups of one to five candidates, small whole costs (so that ties and exact hits are common)."""
    quantities = QUANTITIES[: draw(st.integers(1, 3))]
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        numbers = st.lists(st.integers(0, 6), min_size=size, max_size=size)
        losses = np.array(draw(numbers), float) * draw(st.sampled_from([1.0, 1e-6, 1e4]))
        groups.append(Choices(losses, {q: np.array(draw(numbers), float) for q in quantities}))
    return groups, {q: float(draw(st.integers(0, 16))) for q in quantities}


def check(groups: list[Choices], limits: dict[str, float], found: Allocation) -> None:
    for n, (group, pick) in enumerate(zip(groups, found.picks, strict=True)):
        assert 0 <= pick < len(group.losses), n
    for q in limits:
        exact = sum(float(g.costs[q][p]) for g, p in zip(groups, found.picks, strict=True))
        assert exact <= limits[q]
        assert found.costs[q] == pytest.approx(exact)
    assert found.loss == pytest.approx(sum(float(g.losses[p]) for g, p in zip(groups, found.picks, strict=True)))


@settings(max_examples=250, derandomize=True)
@given(problem=problems())
def test_finds_the_optimum_or_says_that_there_is_none(problem: tuple[list[Choices], dict[str, float]]) -> None:
    groups, limits = problem
    best = brute(groups, limits)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            allocate(groups, limits)
        assert caught.value.reachable == {q: sum(float(g.costs[q].min()) for g in groups) for q in limits}
        assert "\n" not in str(caught.value)
        return
    found = allocate(groups, limits)
    check(groups, limits, found)
    assert found.loss == pytest.approx(best, rel=2e-4, abs=1e-12)


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 5), exponent=st.integers(-9, 12))
def test_real_costs_of_any_size(seed: int, groups: int, exponent: int) -> None:
    """Costs from 1e-9 to 1e12; the bound is the exact sum of some combination, which must not be missed."""
    random = np.random.default_rng(seed)
    made = [
        Choices(random.exponential(1, 5), {"macs": 10.0**exponent * random.random(5), "params": random.random(5)})
        for _ in range(groups)
    ]
    picks = random.integers(0, 5, groups)
    limits = {q: float(sum(float(g.costs[q][p]) for g, p in zip(made, picks, strict=True))) for q in ("macs", "params")}
    found = allocate(made, limits)
    best = brute(made, limits)
    assert best is not None
    for q, limit in limits.items():
        assert found.costs[q] <= limit * (1 + 1e-12)
    assert found.loss <= best * (1 + 1e-4) + 1e-12


def test_the_optimum_on_the_limit_is_found_and_one_below_it_is_not() -> None:
    groups = [Choices(np.array([0.0, 1.0]), {"macs": np.array([1e9 + 1, 1.0])}) for _ in range(3)]
    on = 3e9 + 3
    assert allocate(groups, {"macs": on}).picks == (0, 0, 0)
    below = allocate(groups, {"macs": on - 1})
    assert sorted(below.picks) == [0, 0, 1]
    assert allocate(groups, {"macs": 3.0}).picks == (1, 1, 1)
    with pytest.raises(InfeasibleError, match=r"macs can't be brought below 3, the limit is 2\.9"):
        allocate(groups, {"macs": 2.9})


def test_no_limits_take_the_least_loss() -> None:
    groups = [Choices(np.array([2.0, 0.5, 0.5]), {"macs": np.array([1.0, 9.0, 3.0])})] * 2
    assert allocate(groups, {}).loss == 1.0


def test_single_candidates_and_zero_costs() -> None:
    groups = [
        Choices(np.array([0.3]), {"macs": np.array([5.0])}),
        Choices(np.array([0.0, 0.2]), {"macs": np.array([0.0, 0.0])}),
    ]
    assert allocate(groups, {"macs": 5.0}).picks == (0, 0)
    assert allocate(groups[1:], {"macs": 0.0}).picks == (0,)
    with pytest.raises(InfeasibleError):
        allocate(groups, {"macs": 4.0})


def test_limits_that_only_fail_together() -> None:
    costs = {"macs": np.array([1.0, 9.0]), "params": np.array([9.0, 1.0])}
    with pytest.raises(InfeasibleError, match="no plan keeps all limits at once") as caught:
        allocate([Choices(np.zeros(2), costs)], {"macs": 5.0, "params": 5.0})
    assert caught.value.reachable == {"macs": 1.0, "params": 1.0}


@pytest.mark.parametrize("losses", [[], [np.nan], [1.0, np.inf]])
def test_losses_that_are_no_numbers(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Choices(np.array(losses), {"macs": np.zeros(len(losses))})


@settings(max_examples=40, derandomize=True)
@given(problem=problems(), bounds=st.lists(st.integers(0, 24), min_size=1, max_size=12))
def test_the_front_is_monotone(problem: tuple[list[Choices], dict[str, float]], bounds: list[int]) -> None:
    groups, limits = problem
    ordered = [float(b) for b in sorted(bounds, reverse=True)]
    found = allocate_front(groups, limits, "macs", ordered)
    losses, costs = [a.loss for a in found], [a.costs["macs"] for a in found]
    assert all(b >= a * (1 - 2e-4) - 1e-12 for a, b in itertools.pairwise(losses))
    assert len({a.picks for a in found}) == len(found)
    assert all(c <= max(ordered[0], 0) for c in costs)
    for allocation in found:
        check(groups, limits, allocation)
    for bound in ordered:
        best = brute(groups, {**limits, "macs": min(bound, limits["macs"])})
        if best is not None:
            within = [a.loss for a in found if a.costs["macs"] <= bound]
            assert min(within) == pytest.approx(best, rel=2e-4, abs=1e-12)


def test_many_groups_and_candidates() -> None:
    random = np.random.default_rng(0)
    groups = []
    for _ in range(100):
        keep = np.sort(random.random(40))
        groups.append(Choices((1 - keep) ** 2 * random.exponential(), {"macs": keep * 1e6, "params": keep[::-1] * 1e3}))
    limits = {"macs": 55e6, "params": 6e4}
    found = allocate(groups, limits)
    check(groups, limits, found)
    # no exchange of one candidate within the limits is better by more than the gap
    for n, group in enumerate(groups):
        for pick in range(40):
            moved = {q: found.costs[q] + group.costs[q][pick] - group.costs[q][found.picks[n]] for q in limits}
            gain = float(group.losses[found.picks[n]] - group.losses[pick])
            assert any(moved[q] > limits[q] for q in limits) or gain <= 1e-4 * found.loss + 1e-9


@settings(max_examples=150, derandomize=True)
@given(problem=problems())
def test_the_frontier_holds_the_optimum_at_each_of_its_costs(problem: tuple[list[Choices], dict[str, float]]) -> None:
    groups, _ = problem
    line = frontier(groups, "macs")
    rounding = 1e-9 * max(float(g.losses.max()) for g in groups)
    assert (np.diff(line.costs) > 0).all()
    assert (np.diff(line.losses) < 0).all()
    for n, (cost, loss) in enumerate(zip(line.costs, line.losses, strict=True)):
        picks = line.picks(n)
        assert sum(float(g.costs["macs"][p]) for g, p in zip(groups, picks, strict=True)) == pytest.approx(cost)
        best = brute(groups, {"macs": float(cost)})
        assert best is not None
        assert loss == pytest.approx(best, abs=rounding)
    assert line.losses[-1] == pytest.approx(brute(groups, {"macs": np.inf}), abs=rounding)
