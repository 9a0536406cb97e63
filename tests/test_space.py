"""From numbers to plans: every proposal is an optimum within the exact limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.allocate import allocate
from rankopt.candidates import Group
from rankopt.errors import InfeasibleError
from rankopt.layer_spec import Call, LayerSpec
from rankopt.plan import DENSE, Fingerprint, LayerChoice, Plan
from rankopt.space import Near, SearchSpace, stages


def group(name: str, seed: int, size: int = 16, levels: int = 6, tied: int = 1, with_dense: bool = True) -> Group:
    """A made-up layer with candidates of two methods whose losses fall with their costs."""
    random = np.random.default_rng(seed)
    layers = tuple(
        LayerSpec(
            f"{name}.{n}" if n else name,
            "conv2d",
            8,
            8,
            (3, 3),
            (1, 1),
            (1, 1),
            (1, 1),
            calls=(Call(1, (size, size), (size, size)),),
            order=seed,
        )
        for n in range(tied)
    )
    keeps = np.sort(random.uniform(0.05, 0.95, 2 * levels))
    choices = [LayerChoice(("svd", "tucker2")[n % 2], {"rank": n + 1}) for n in range(2 * levels)]
    losses = random.exponential(0.1) * (1 - keeps) ** 2 * random.uniform(0.5, 1.5, 2 * levels)
    macs = np.floor(keeps * layers[0].macs) * tied
    params = np.floor(random.uniform(0.3, 1, 2 * levels) * keeps * layers[0].params) * tied
    if with_dense:
        choices, losses = [DENSE, *choices], np.append(0.0, losses)
        macs, params = np.append(layers[0].macs * tied, macs), np.append(layers[0].params * tied, params)
    return Group(layers, tuple(choices), losses, macs.astype(float), params.astype(float))


GROUPS = [group(f"l{n}", n, 16 >> (n // 3), tied=2 if n == 4 else 1) for n in range(8)]
FIXED = {"macs": 1000.0, "params": 77.0}


def totals(groups: list[Group] = GROUPS) -> dict[str, float]:
    return {q: FIXED[q] + sum(float(getattr(la, q)) for g in groups for la in g.layers) for q in FIXED}


def made(limits: Mapping[str, float] | None = None, groups: list[Group] = GROUPS, **options: Any) -> SearchSpace:
    """Limits as shares of dense."""
    bounds = {q: share * totals(groups)[q] for q, share in (limits or {}).items()}
    return SearchSpace(groups, FIXED, totals(groups), bounds, **options)


def cost(plan: Plan, quantity: str, groups: list[Group] = GROUPS) -> float:
    total = FIXED[quantity]
    for g in groups:
        assert len({plan[la.name] for la in g.layers}) == 1
        total += float(getattr(g, quantity)[g.choices.index(plan[g.name])])
    return total


def seeds(space: SearchSpace, count: int) -> list[dict[str, float]]:
    """Budgets along the whole range, the largest first, and no corrections."""
    neutral = {name: 1.0 if name == "exponent" else 0.0 for name in space.parameters()}
    return [{**neutral, "budget": float(b)} for b in np.linspace(space.highest, space.lowest, count)]


@settings(max_examples=50, derandomize=True)
@given(
    data=st.data(),
    macs=st.one_of(st.none(), st.floats(0.2, 1.1)),
    params=st.one_of(st.none(), st.floats(0.3, 1.1)),
    quantity=st.sampled_from(["macs", "params"]),
)
def test_every_proposal_keeps_the_limits(data: st.DataObject, macs: Any, params: Any, quantity: str) -> None:
    limits = {q: v for q, v in (("macs", macs), ("params", params)) if v is not None}
    try:
        space = made(limits, quantity=quantity)
    except InfeasibleError:
        return
    values = {name: data.draw(st.floats(low, high)) for name, (low, high) in space.parameters().items()}
    plan = space.plan_of(values)
    for q, share in limits.items():
        assert cost(plan, q) <= share * totals()[q] * (1 + 1e-12)
    assert {la.name for g in GROUPS for la in g.layers} == set(plan.layers)
    assert np.isfinite(space.predicted(plan))


def test_neutral_numbers_give_the_allocated_plan() -> None:
    space = made({"macs": 0.5})
    for seed in seeds(space, 5):
        plan = space.plan_of(seed)
        bound = seed["budget"] * totals()["macs"] - FIXED["macs"]
        expected = allocate([g.as_choices() for g in GROUPS], {"macs": bound})
        assert space.predicted(plan) == pytest.approx(expected.loss, rel=1e-3)
        assert cost(plan, "macs") <= seed["budget"] * totals()["macs"] * (1 + 1e-12)


@pytest.mark.parametrize("limits", [{}, {"macs": 0.6}, {"params": 0.5}])
def test_budgets_go_from_the_limit_to_what_can_be_reached(limits: dict[str, float]) -> None:
    space = made(limits)
    assert space.highest == pytest.approx(limits.get("macs", 1.0))
    costs = [cost(space.plan_of(s), "macs") for s in seeds(space, 12)]
    assert costs == sorted(costs, reverse=True)
    least = FIXED["macs"] + sum(float(g.macs.min()) for g in GROUPS)
    if "macs" not in limits:  # below a limit nobody looks further down than to half of it
        assert space.lowest == pytest.approx(1.02 * least / totals()["macs"])
        assert costs[-1] <= 1.02 * least
    for seed in seeds(space, 3):
        for name, value in seed.items():
            low, high = space.parameters()[name]
            assert low <= value <= high


def test_the_first_seed_is_the_best_plan_right_at_the_limit() -> None:
    exact = cost(made({"macs": 0.47}).plan_of(seeds(made({"macs": 0.47}), 1)[0]), "macs")
    space = made({"macs": exact / totals()["macs"]})  # the optimum costs exactly the limit
    assert cost(space.plan_of(seeds(space, 1)[0]), "macs") == exact


def test_corrections_move_the_plan() -> None:
    space = made({"macs": 0.4})
    neutral = seeds(space, 1)[0]

    def share(values: Mapping[str, float]) -> float:
        methods = space.plan_of(values).methods()
        return methods.get("svd", 0) / max(methods.get("svd", 0) + methods.get("tucker2", 0), 1)

    liked = share({**neutral, "method.svd": -1.5, "method.tucker2": 1.5})
    assert share({**neutral, "method.svd": 1.5, "method.tucker2": -1.5}) < liked
    assert set(space.stages) == {"16x16", "8x8", "4x4"}
    dear = space.plan_of({**neutral, "stage.16x16": 1.5})
    cheap = space.plan_of({**neutral, "stage.16x16": -1.5})

    def lost(plan: Plan) -> float:
        return sum(float(g.losses[g.choices.index(plan[g.name])]) for g in GROUPS[:3])

    assert lost(dear) < lost(cheap)


def test_a_limit_that_nothing_meets_says_what_is_reachable() -> None:
    least = FIXED["macs"] + sum(float(g.macs.min()) for g in GROUPS)
    with pytest.raises(InfeasibleError) as caught:
        made({"macs": 0.01, "params": 0.9})
    assert caught.value.reachable["macs"] == pytest.approx(least)
    assert f"macs {least / totals()['macs']:.1%} of dense" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_budget_below_what_other_limits_leave() -> None:
    space = made({"params": 0.45})
    plan = space.plan_of({**seeds(space, 1)[0], "budget": 0.0001})
    assert cost(plan, "params") <= 0.45 * totals()["params"]


def test_a_single_candidate_each() -> None:
    single = [group(f"g{n}", n, levels=1, with_dense=False) for n in range(2)]
    single = [Group(g.layers, g.choices[:1], g.losses[:1], g.macs[:1], g.params[:1]) for g in single]
    space = made(groups=single)
    assert space.lowest == space.highest
    assert space.plan_of(seeds(space, 1)[0]).changed()


def test_no_groups() -> None:
    space = SearchSpace([], {"macs": 5.0}, {"macs": 5.0}, {})
    assert space.plan_of(seeds(space, 1)[0]).changed() == {}


def test_plans_carry_the_model() -> None:
    fingerprint = Fingerprint("a", "b")
    space = made(fingerprint=fingerprint, skipped={"head": "tied"})
    plan = space.plan_of(seeds(space, 1)[0])
    assert (plan.fingerprint, plan.skipped) == (fingerprint, {"head": "tied"})


def test_predicted_of_a_foreign_choice_is_not_a_number() -> None:
    assert np.isnan(made().predicted(Plan({"l0": LayerChoice("cp", {"rank": 1})})))


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_near_a_plan_no_more_layers_move_and_none_further_than_asked(data: st.DataObject) -> None:
    space = made({"macs": 0.9})
    losses = [g.losses * data.draw(st.floats(0.2, 5.0)) for g in GROUPS]
    centre = space.solve(space.losses, data.draw(st.floats(0.2, 0.9)))
    layers, levels = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3))
    budget = data.draw(st.floats(0.1, 0.9))
    plan = space.solve(losses, budget, Near(centre, layers, levels))
    moved = [g for g in GROUPS if plan[g.name] != centre[g.name]]
    assert len(moved) <= layers
    for g in moved:
        loss = losses[GROUPS.index(g)]
        here, there = g.choices.index(centre[g.name]), g.choices.index(plan[g.name])
        low, high = sorted((g.macs[here], g.macs[there]))
        between = [n for n in range(len(g.choices)) if low < g.macs[n] < high]
        better = [n for n in between if not (loss[g.macs <= g.macs[n]] < loss[n]).any()]
        assert len(better) < levels + 1
    if plan.digest != centre.digest:
        assert cost(plan, "macs") <= budget * totals()["macs"] * (1 + 1e-12)


def test_near_a_plan_the_best_move_is_found() -> None:
    """Against all moves of one layer by one level."""
    space = made({"macs": 0.9})
    centre = space.solve(space.losses, 0.5)
    budget = cost(centre, "macs") * 1.1 / totals()["macs"]
    plan = space.solve(space.losses, budget, Near(centre, 1, 1))
    picks = space.picks(centre)
    assert picks is not None
    best = space.predicted(centre)
    for n, g in enumerate(GROUPS):
        front = [i for i in np.lexsort((g.losses, g.macs)) if not (g.losses[g.macs <= g.macs[i]] < g.losses[i]).any()]
        at = front.index(picks[n])
        for step in (-1, 1):
            if 0 <= at + step < len(front):
                other = space.plan([front[at + step] if m == n else p for m, p in enumerate(picks)])
                if cost(other, "macs") <= budget * totals()["macs"]:
                    best = min(best, space.predicted(other))
    assert space.predicted(plan) == pytest.approx(best)


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_a_plan_told_layer_by_layer_is_the_plan(data: st.DataObject) -> None:
    space = made()
    plan = space.plan([data.draw(st.integers(0, len(g.choices) - 1)) for g in GROUPS])
    numbers, ranges = space.layer_numbers(plan), space.layer_parameters()
    assert list(numbers) == list(ranges)
    for name, value in numbers.items():
        given = ranges[name]
        assert value in given if isinstance(value, str) else given[0] <= value <= given[1]  # type: ignore[operator]
    again = space.plan_by_layer(numbers)
    for g in GROUPS:  # of two candidates of one method and cost the first one counts
        a, b = g.choices.index(plan[g.name]), g.choices.index(again[g.name])
        assert (g.choices[a].method, g.macs[a]) == (g.choices[b].method, g.macs[b])


def test_the_frontier_is_made_of_optima() -> None:
    space = made()
    line = space.frontier(space.losses)
    assert (np.diff(line.costs) > 0).all()
    assert (np.diff(line.losses) < 0).all()
    for n in range(0, len(line.costs), 7):
        plan = space.plan(line.picks(n))
        assert cost(plan, "macs") == pytest.approx(line.costs[n] + FIXED["macs"])
        assert space.predicted(plan) == pytest.approx(line.losses[n])
        assert space.shares(line.costs)[n] == pytest.approx(cost(plan, "macs") / totals()["macs"])
        best = allocate([g.as_choices() for g in GROUPS], {"macs": float(line.costs[n]) * (1 + 1e-9)})
        assert space.predicted(plan) == pytest.approx(best.loss, rel=1e-3)


def test_stages_by_size_and_by_depth() -> None:
    assert {k: len(v) for k, v in stages(GROUPS).items()} == {"16x16": 3, "8x8": 3, "4x4": 2}
    same = [group(f"b{n}", n, 8) for n in (3, 0, 11, 2, 5, 6, 7, 8, 9, 10, 1, 4)]
    parts = stages(same)
    assert [len(p) for p in parts.values()] == [3, 3, 3, 3]
    assert parts["part1"] == {"b0", "b1", "b2"}
    assert len(stages(same[:2])) == 1
    assert stages([]) == {}
