"""The plans that latency is fitted on: drawn as said, solved as a brute force solves, and worth their measurements."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
import torch
from made_up import MadeUp, Small, groups_of

from rankopt import latency as latency_module
from rankopt.latency import PROBES, PlanLatency
from rankopt.latency_probes import random_plans, solved_plans
from rankopt.layers import find_layers
from rankopt.plan import DENSE, Plan
from rankopt.targets.target import Subject

torch.manual_seed(0)
MODEL = Small().eval()
EXAMPLE = torch.zeros(1, 3, 16, 16)
LAYERS = find_layers(MODEL, EXAMPLE)
GROUPS = groups_of(LAYERS)
SOME = GROUPS[:3]


def test_random_plans_change_few_and_many_layers() -> None:
    plans = random_plans(GROUPS, 200, seed=0)
    assert plans == random_plans(GROUPS, 200, seed=0)
    assert plans[:50] == random_plans(GROUPS, 50, seed=0)
    assert plans != random_plans(GROUPS, 200, seed=1)
    sizes = {len(p.changed()) for p in plans}
    assert {1, len(GROUPS)} <= sizes
    for plan in plans[:20]:
        for g in GROUPS:
            assert plan[g.name] in g.choices
    assert random_plans([], 2, 0) == [Plan({}), Plan({})]
    only_dense = [type(GROUPS[0])(GROUPS[0].layers, (DENSE,), np.zeros(1), np.ones(1), np.ones(1))]
    assert random_plans(only_dense, 1, 0) == [Plan({})]


def times(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [0.1 + g.macs / max(g.macs) * random.uniform(0.5, 1.5, len(g.choices)) for g in SOME]


def loss_and_time(plan: Plan, costs: list[np.ndarray]) -> tuple[float, float]:
    picks = [g.choices.index(plan[g.name]) for g in SOME]
    return sum(g.losses[n] for g, n in zip(SOME, picks, strict=True)), sum(
        c[n] for c, n in zip(costs, picks, strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
def test_solved_plans_lose_least_at_their_budgets(seed: int) -> None:
    costs = times(seed)
    dense = sum(float(c[g.choices.index(DENSE)]) for g, c in zip(SOME, costs, strict=True))
    every = list(itertools.product(*(range(len(g.choices)) for g in SOME)))
    losses = np.array([sum(g.losses[n] for g, n in zip(SOME, p, strict=True)) for p in every])
    taken = np.array([sum(c[n] for c, n in zip(costs, p, strict=True)) for p in every])
    budgets = [taken.min() + k / 5 * (dense - taken.min()) for k in (1, 2, 3, 4)]
    found = solved_plans(SOME, costs, dense, 4)
    assert 1 <= len(found) <= 4
    best = [losses[taken <= b + 1e-12].min() for b in budgets]
    for plan in found:
        loss, took = loss_and_time(plan, costs)
        meets = [
            loss <= b * (1 + 4e-3) + 1e-9 and took <= budget + 1e-9 for b, budget in zip(best, budgets, strict=True)
        ]
        assert any(meets)


def test_where_no_plan_is_faster_than_dense_there_are_none() -> None:
    costs = times(0)
    assert solved_plans(SOME, costs, 0.5 * sum(float(c.min()) for c in costs), 4) == []
    assert solved_plans([], [], 1.0, 4) == []


class Elsewhere(MadeUp):
    """A device on which a layer alone takes up to a sixth more or less than in a network, each candidate its own."""

    def time(self, subject: Subject) -> float:
        time = super().time(subject)
        return time * (1 + (zlib.crc32(subject.key.encode()) % 1000 / 1000 - 0.5) / 3) if "(" in subject.key else time


def test_the_plans_that_a_search_asks_for_are_predicted_better(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Elsewhere(call=0.05)
    off = {}
    for name, rounds in (("random alone", ()), ("solved too", latency_module.SOLVED)):
        monkeypatch.setattr(latency_module, "SOLVED", rounds)
        found = PlanLatency(target, MODEL, LAYERS, (EXAMPLE,), cache=False)
        found.prepare(GROUPS)
        assert (len(found.measured_plans()) > PROBES) == bool(rounds)
        costs = [found.costs(g) for g in GROUPS]
        asked = solved_plans(GROUPS, costs, found.dense.value - found.fixed, 11)
        real = [m.value for m in found.measure_again(asked)]
        off[name] = np.median([abs(found.predict(p) / r - 1) for p, r in zip(asked, real, strict=True)])
    assert off["solved too"] < 0.8 * off["random alone"]
    assert off["random alone"] > 0.02
