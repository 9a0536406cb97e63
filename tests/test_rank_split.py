"""The split of a cost between several ranks, against an exhaustive search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.rank_split import full_ranks, rank_levels, split
from rankopt.testing import correlated_metric, specify

METHODS = ["svd", "svd_in", "spatial_svd", "tucker2", "tucker", "tensor_train", "tensor_ring"]
KEEPS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def layer_of(out: int = 12, inp: int = 10, groups: int = 1, seed: int = 0) -> tuple[LayerSpec, torch.Tensor, Metric]:
    torch.manual_seed(seed)
    module = nn.Conv2d(inp, out, 3, padding=1, groups=groups).double()
    layer = specify(module, torch.randn(1, inp, 6, 6, dtype=torch.float64))
    return layer, group_weight(layer, module.weight.detach()), correlated_metric(layer, seed)


def exhaustive(way: Any, layer: LayerSpec, factors: Any, keep: float, multiple: int) -> float | None:
    """The least energy lost by any ranks of that multiple within the cost."""
    axes = [
        np.arange(multiple, b + 1, multiple) if b >= multiple else np.array([b])
        for b in way.rank_bounds(layer).values()
    ]
    table = np.array(list(itertools.product(*axes)))
    ranks = {n: table[:, i] for i, n in enumerate(way.rank_bounds(layer))}
    fits = way.macs(layer, ranks) <= keep * layer.macs
    return float(way.lost(factors, ranks)[fits].min()) if fits.any() else None


@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("name", METHODS)
def test_no_better_ranks_exist_at_that_cost(name: str, multiple: int) -> None:
    layer, weight, metric = layer_of()
    way = method(name)
    factors = way.factorize(layer, weight, metric)
    found = split(way, layer, factors, KEEPS, multiple)
    for keep in KEEPS:
        best = exhaustive(way, layer, factors, keep, multiple)
        assert (keep in found) == (best is not None)
        if best is None:
            continue
        ranks = found[keep]
        way.check(layer, ranks)
        assert way.macs(layer, ranks) <= keep * layer.macs
        assert float(way.lost(factors, ranks)) == pytest.approx(best, abs=1e-9)
        bounds = way.rank_bounds(layer)
        assert all(r % multiple == 0 or r == bounds[n] < multiple for n, r in ranks.items())


@settings(max_examples=25, derandomize=True)
@given(
    out=st.integers(2, 20),
    inp=st.integers(2, 20),
    groups=st.integers(1, 2),
    multiple=st.integers(1, 9),
    keep=st.floats(0.05, 1),
    name=st.sampled_from(["tucker2", "tensor_train", "tucker"]),
)
def test_any_layer(out: int, inp: int, groups: int, multiple: int, keep: float, name: str) -> None:
    layer, weight, metric = layer_of(out * groups, inp * groups, groups)
    way = method(name)
    factors = way.factorize(layer, weight, metric)
    found, best = split(way, layer, factors, [keep], multiple), exhaustive(way, layer, factors, keep, multiple)
    assert bool(found) == (best is not None)
    if best is not None:
        assert float(way.lost(factors, found[keep])) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("name", ["tucker2", "tensor_train"])
def test_a_wide_layer_where_the_grid_is_coarse(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(160, 192, 3)
    layer = specify(module, torch.randn(1, 160, 5, 5))
    scale = torch.arange(1, 193) ** -0.8
    weight = group_weight(layer, module.weight.detach()) * scale.reshape(1, -1, 1, 1, 1) * scale[:160].reshape(-1, 1, 1)
    way = method(name)
    factors = way.factorize(layer, weight, Metric())
    for keep in (0.1, 0.3, 0.6):
        found = split(way, layer, factors, [keep])[keep]
        if len(found) == 2:  # three ranks would be too many combinations
            best = exhaustive(way, layer, factors, keep, 1)
            assert best is not None
            assert float(way.lost(factors, found)) <= best + 2e-4
        assert way.macs(layer, found) <= keep * layer.macs
        cheaper = {n: max(1, r - 3) for n, r in found.items()}
        assert way.lost(factors, cheaper) > way.lost(factors, found)


def test_layers_that_share_their_ranks_add_up() -> None:
    way = method("tucker2")
    (layer, first, metric), (_, second, other) = layer_of(seed=0), layer_of(seed=7)
    factors = [way.factorize(layer, first, metric), way.factorize(layer, second, other)]
    for keep, ranks in split(way, layer, factors, KEEPS).items():
        axes = [range(1, b + 1) for b in way.rank_bounds(layer).values()]
        combined = min(
            sum(float(way.lost(f, dict(zip(ranks, r, strict=True)))) for f in factors)
            for r in itertools.product(*axes)
            if way.macs(layer, dict(zip(ranks, r, strict=True))) <= keep * layer.macs
        )
        assert sum(float(way.lost(f, ranks)) for f in factors) == pytest.approx(combined, abs=1e-9)


def test_levels() -> None:
    assert rank_levels(5, 1).tolist() == [1, 2, 3, 4, 5]
    assert rank_levels(20, 8).tolist() == [8, 16]
    assert rank_levels(7, 8).tolist() == [7]
    assert rank_levels(8, 8).tolist() == [8]
    few = rank_levels(1000, 8, limit=10)
    assert len(few) <= 10
    assert few[0] == 8
    assert few[-1] == 1000
    assert (few % 8 == 0).all()
    assert full_ranks({"a": 7, "b": 20, "c": 64}, 8) == {"a": 7, "b": 16, "c": 64}


def test_nothing_fits_a_cost_of_almost_nothing() -> None:
    layer, weight, _ = layer_of()
    way = method("svd")
    assert split(way, layer, way.factorize(layer, weight, Metric()), [1e-6]) == {}
