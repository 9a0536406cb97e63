"""Changes predicted around a compressed model, against what the divergence does when the change is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rankopt.batches import Batch
from rankopt.plan import DENSE, Plan
from rankopt.search import Search
from rankopt.sensitivity import Sensitivities, SensitivityOptions


@pytest.fixture(scope="module")
def search() -> Search:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(4)
    x = torch.randn(160, 3, 8, 8)
    return Search(
        net.eval(), x[:1], calibration=[Batch((x[:96],))], validation=[Batch((x[96:],))], limits=[], refit=None,
        space={"methods": ["svd"], "keep": {"min": 0.2, "max": 0.8, "levels": 4}}, precision="float32",
    )  # fmt: skip


def sensitivities(search: Search, samples: int = 96, draws: int = 8) -> Sensitivities:
    return Sensitivities(
        search.model, search.groups, search._factors, search.calibration, search.divergence,
        search.evaluator.build, SensitivityOptions(samples, draws),
    )  # fmt: skip


def kl(search: Search, plan: Plan) -> float:
    return search.evaluator.quality(search.evaluator.build(plan), search.calibration)["kl"]


def one_step(search: Search, plan: Plan, group: int, choice: int) -> Plan:
    picks = search.space.picks(plan)
    assert picks is not None
    return search.space.plan([choice if n == group else p for n, p in enumerate(picks)])


@pytest.mark.parametrize("budget", [0.9, 0.5])
def test_one_step_changes_the_divergence_as_predicted(search: Search, budget: float) -> None:
    plan = search.space.solve(search.space.losses, budget)
    now, changes = kl(search, plan), sensitivities(search)(plan)
    predicted, true, summed = [], [], []
    for n, group in enumerate(search.groups):
        at = group.choices.index(plan[group.name])
        assert changes[n][at] == 0
        for choice in range(len(group.choices)):
            if choice != at:
                predicted.append(changes[n][choice])
                true.append(kl(search, one_step(search, plan, n, choice)) - now)
                summed.append(group.losses[choice] - group.losses[at])
    assert np.corrcoef(predicted, true)[0, 1] > 0.9
    assert np.sign(predicted)[np.abs(true) > 0.2 * now].tolist() == np.sign(true)[np.abs(true) > 0.2 * now].tolist()
    assert np.corrcoef(predicted, true)[0, 1] > np.corrcoef(summed, true)[0, 1] - 0.02


def test_at_the_dense_model_they_are_the_losses(search: Search) -> None:
    dense = Plan({g.name: DENSE for g in search.groups})
    for group, changes in zip(search.groups, sensitivities(search)(dense), strict=True):
        index = [n for n, c in enumerate(group.choices) if c != DENSE]
        assert np.corrcoef(np.log(changes[index]), np.log(group.losses[index]))[0, 1] > 0.9


def test_the_models_are_left_as_they_were(search: Search) -> None:
    before = {k: v.clone() for k, v in search.model.state_dict().items()}
    sensitivities(search, 16, 1)(search.space.solve(search.space.losses, 0.6))
    assert all(torch.equal(v, before[k]) for k, v in search.model.state_dict().items())
    assert all(p.requires_grad for p in search.model.parameters())
