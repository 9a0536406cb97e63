"""Corrections of the prediction: found again where they were made up, and known to be unsure where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_space import GROUPS, made

from rankopt.loss_model import LossModel
from rankopt.plan import LayerChoice, Plan

SPACE = made()


def plans(count: int, seed: int) -> list[Plan]:
    random = np.random.default_rng(seed)
    return [SPACE.plan([int(random.integers(1, len(g.choices))) for g in GROUPS]) for _ in range(count)]


def truth(plan: Plan, layers: np.ndarray, svd: float = 0.0, power: float = 1.0, scale: float = 1.0) -> float:
    """Losses as the model has them, written down apart from it."""
    total = 0.0
    for factor, group in zip(layers, GROUPS, strict=True):
        loss = float(group.losses[group.choices.index(plan[group.name])])
        total += np.exp(factor + (svd if plan[group.name].method == "svd" else 0.0)) * loss
    return scale * total**power


LAYERS = np.array([0.5, -0.4, 0.0, 0.8, -0.6, 0.1, 0.3, -0.2])


def test_made_up_corrections_are_found() -> None:
    model, seen = LossModel(GROUPS), plans(80, 0)
    model.fit(seen, [truth(p, LAYERS, svd=0.4, power=0.9, scale=1.3) for p in seen])
    others = plans(50, 1)
    predicted = np.array([model.loss(p) for p in others])
    wanted = np.array([truth(p, LAYERS, svd=0.4, power=0.9, scale=1.3) for p in others])
    assert np.median(abs(predicted / wanted - 1)) < 0.02
    uncorrected = np.array([SPACE.predicted(p) for p in others])
    assert np.corrcoef(np.log(predicted), np.log(wanted))[0, 1] > np.corrcoef(np.log(uncorrected), np.log(wanted))[0, 1]
    found = model.corrections()
    assert found.methods["svd"] - found.methods["tucker2"] == pytest.approx(0.4, abs=0.1)
    assert np.corrcoef(found.layers, LAYERS)[0, 1] > 0.85


def test_without_measurements_it_is_the_prediction() -> None:
    model = LossModel(GROUPS)
    for plan in plans(10, 2):
        assert model.loss(plan) == pytest.approx(SPACE.predicted(plan), rel=1e-6)
    model.fit([], [])
    model.fit([Plan({})], [0.0])
    assert model.loss(plans(1, 3)[0]) == pytest.approx(SPACE.predicted(plans(1, 3)[0]), rel=1e-6)


def test_the_summed_losses_stand_for_the_plan() -> None:
    model, seen = LossModel(GROUPS), plans(30, 4)
    model.fit(seen, [truth(p, LAYERS) for p in seen])
    losses = model.losses(model.corrections())
    for plan in plans(10, 5):
        summed = sum(float(v[g.choices.index(plan[g.name])]) for v, g in zip(losses, GROUPS, strict=True))
        assert float(model.predicted(summed)) == pytest.approx(model.loss(plan))
    assert [len(v) for v in losses] == [len(g.choices) for g in GROUPS]
    assert all((v >= 0).all() for v in losses)


def test_draws_scatter_less_the_more_was_measured() -> None:
    def scatter(count: int) -> float:
        model, seen = LossModel(GROUPS), plans(count, 6)
        model.fit(seen, [truth(p, LAYERS) for p in seen])
        random = np.random.default_rng(0)
        return float(np.std([model.corrections(random).layers for _ in range(200)], axis=0).mean())

    assert scatter(4) > scatter(20) > scatter(100)


def test_a_draw_comes_again_with_its_generator() -> None:
    model = LossModel(GROUPS)
    one, two, other = (model.corrections(np.random.default_rng(s)).layers for s in (1, 1, 2))
    assert (one == two).all()
    assert (one != other).any()


def test_the_slopes_are_those_of_the_values() -> None:
    model = LossModel(GROUPS)
    picks = np.array([SPACE.picks(p) for p in plans(5, 7)])
    logs, methods = model._tables(picks)
    random = np.random.default_rng(3)
    at = model._prior + 0.3 * random.standard_normal(len(model._prior))
    values, slopes = model._values(at, logs, methods)
    for n in range(len(at)):
        step = np.zeros(len(at))
        step[n] = 1e-6
        moved, _ = model._values(at + step, logs, methods)
        assert (moved - values) / 1e-6 == pytest.approx(slopes[:, n], abs=1e-4)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=12), st.integers(0, 99))
def test_whatever_was_measured_the_model_stays_finite(losses: list[float], seed: int) -> None:
    model = LossModel(GROUPS)
    model.fit(plans(len(losses), seed), losses)
    assert all(np.isfinite(model.loss(p)) for p in plans(5, seed + 1))
    assert np.isfinite(model.corrections(np.random.default_rng(0)).layers).all()


def test_what_is_no_candidate_is_not_predicted() -> None:
    assert np.isnan(LossModel(GROUPS).loss(Plan({"l0": LayerChoice("cp", {"rank": 1})})))
    assert LossModel(GROUPS).loss(SPACE.plan([0] * len(GROUPS))) == 0.0
