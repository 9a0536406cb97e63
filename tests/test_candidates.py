"""Candidates: exact costs, caps, ties and explicit ranks; and how well predicted losses order measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from rankopt.batches import Batch, as_batches
from rankopt.calibration import CalibrationOptions
from rankopt.candidates import Group, candidates
from rankopt.cost import count_thop
from rankopt.decompositions import method
from rankopt.divergence import Divergence
from rankopt.errors import RefusedDecomposition
from rankopt.factors import Factors
from rankopt.layers import find_layers, inference
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.space_file import load_space, resolve, tied_groups
from rankopt.surgery import apply

EXAMPLE = torch.zeros(1, 2, 10, 10)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.fc = nn.Linear(8, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.max_pool2d(torch.relu(self.bn(self.stem(x))), 2)
        h = h + self.depthwise(h)
        h = torch.relu(self.b(torch.relu(self.a(h))) + h)
        return self.out(torch.relu(self.fc(torch.relu(self.up(h)).mean((2, 3)))))


def task(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stripes of five directions and widths in noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (n,), generator=g)
    grid = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij"))
    angle = y * 0.6 + 0.15 * torch.randn(n, generator=g)
    along = grid[0] * angle.cos()[:, None, None] + grid[1] * angle.sin()[:, None, None]
    phase = 6 * torch.rand(n, generator=g)
    wave = torch.sin(along * (1 + 0.2 * y)[:, None, None] + phase[:, None, None])
    return torch.stack([wave, -wave * 0.5], 1) + 0.5 * torch.randn(n, 2, 10, 10, generator=g), y


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Trained in about two seconds."""
    torch.manual_seed(0)
    model = Net()
    x, y = task(600, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(8):
        for index in torch.randperm(600).split(50):
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


DATA = as_batches(task(256, 1)[0])
SPACE: dict[str, Any] = {"methods": ["svd", "spatial_svd", "tucker2"], "keep": {"min": 0.1, "max": 0.9, "levels": 5}}


def find(
    model: nn.Module, space: Mapping[str, Any] = SPACE, batches: Sequence[Batch] = DATA, **options: Any
) -> tuple[dict[str, Group], Factors]:
    layers = find_layers(model, EXAMPLE)
    loaded = load_space(space)
    first = batches[0]
    with inference(model):
        divergence = Divergence.of(model(*first.args))
    options.setdefault("options", CalibrationOptions(fisher_samples=128))
    spaces, tied = resolve(loaded, layers), tied_groups(loaded, layers)
    groups, factors = candidates(
        model, layers, spaces, tied, batches, divergence, use_statistics=loaded.statistics, **options
    )
    return {g.name: g for g in groups}, factors


def test_every_layer_has_its_candidates_in_the_order_of_the_run(net: nn.Module) -> None:
    groups, _ = find(net)
    assert list(groups) == ["stem", "depthwise", "a", "b", "up", "fc", "out"]
    for group in groups.values():
        assert group.choices[0] == DENSE
        assert group.losses[0] == 0
        assert (group.macs[0], group.params[0]) == (group.layers[0].macs, group.layers[0].params)
        assert np.isfinite(group.losses).all()
        assert (group.losses >= 0).all()
        assert len(set(group.choices)) == len(group.choices)
        assert len(group.choices) == len(group.losses) == len(group.macs) == len(group.params)
        for n, choice in enumerate(group.choices[1:], 1):
            method(choice.method).check(group.layers[0], choice.ranks)
            assert group.macs[n] < group.macs[0] or group.params[n] < group.params[0]
    assert {c.method for c in groups["depthwise"].choices} == {"dense", "spatial_svd"}
    assert "channel" in groups["depthwise"].refused["svd"]
    assert {c.method for c in groups["fc"].choices} == {"dense", "svd"}


def test_costs_are_what_thop_counts_in_the_built_model(net: nn.Module) -> None:
    groups, factors = find(net)
    dense = count_thop(net, EXAMPLE)
    for group in groups.values():
        for n in {len(group.choices) // 2, len(group.choices) - 1}:
            built = apply(net, Plan({group.name: group.choices[n]}), factors)
            counted = count_thop(built, EXAMPLE)
            assert counted.macs - dense.macs == group.macs[n] - group.macs[0], group.name
            assert sum(p.numel() for p in built.parameters()) - sum(p.numel() for p in net.parameters()) == (
                group.params[n] - group.params[0]
            )


def measured(model: nn.Module, groups: Mapping[str, Group], factors: Factors, x: Tensor) -> tuple[Any, Any]:
    """Predicted and really measured divergence of every candidate alone."""
    divergence = Divergence()
    predicted, found = [], []
    with torch.no_grad():
        dense = model(x)
        for group in groups.values():
            for choice, loss in zip(group.choices, group.losses, strict=True):
                if choice != DENSE:
                    built = apply(model, Plan({group.name: choice}), factors).eval()
                    predicted.append(float(loss))
                    found.append(float(divergence.between(dense, built(x)).mean()))
    return np.array(predicted), np.array(found)


def test_predicted_losses_order_the_measured_ones(net: nn.Module) -> None:
    groups, factors = find(net)
    predicted, found = measured(net, groups, factors, task(400, 2)[0])
    assert len(found) > 50
    assert spearmanr(predicted, found).statistic > 0.9
    small = found < 0.01  # where the second order is all there is, the size agrees too
    assert small.sum() > 5
    ratio = np.median(predicted[small] / found[small])
    assert 0.2 < ratio < 5


def test_statistics_beat_the_weights_alone(net: nn.Module) -> None:
    x = task(400, 2)[0]
    losses = [measured(net, *find(net, SPACE | {"statistics": on}), x)[1] for on in (True, False)]
    assert np.log(losses[0] + 1e-6).mean() < np.log(losses[1] + 1e-6).mean()


def test_statistics_off_means_no_metric(net: nn.Module) -> None:
    groups, factors = find(net, SPACE | {"statistics": False})
    assert not factors.metric("a").known
    assert any(group.losses.max() > 0 for group in groups.values())  # still predicted with data


@pytest.mark.parametrize("memory", [1, 30_000, 200_000])
def test_in_chunks_the_same(net: nn.Module, memory: int) -> None:
    texts: list[str] = []
    whole, _ = find(net)
    parts, factors = find(net, max_bytes=memory, progress=texts.append)
    assert sum("calibrating" in t for t in texts) > 1
    assert list(parts) == list(whole)
    for name, group in whole.items():
        assert parts[name].choices == group.choices
        np.testing.assert_allclose(parts[name].losses, group.losses, rtol=1e-3, atol=1e-7)
    built = apply(net, Plan({n: g.choices[-1] for n, g in parts.items()}), factors)
    assert torch.isfinite(built.eval()(EXAMPLE)).all()


def test_tied_layers_share_a_choice(net: nn.Module) -> None:
    groups, factors = find(net, SPACE | {"tied": [["a", "b"]]})
    alone, _ = find(net)
    assert "b" not in groups
    group = groups["a"]
    assert [la.name for la in group.layers] == ["a", "b"]
    assert (group.macs[0], group.params[0]) == (2 * alone["a"].macs[0], 2 * alone["a"].params[0])
    for n, choice in enumerate(group.choices):
        if choice in alone["a"].choices and choice in alone["b"].choices:
            one, two = (alone[k].losses[alone[k].choices.index(choice)] for k in "ab")
            assert group.losses[n] == pytest.approx(one + two, rel=1e-3, abs=1e-9)
            assert group.macs[n] == 2 * alone["a"].macs[alone["a"].choices.index(choice)]
    plan = Plan({la.name: group.choices[-1] for la in group.layers})
    assert apply(net, plan, factors).eval()(EXAMPLE).shape == (1, 5)


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_caps(net: nn.Module, quantity: str) -> None:
    groups, _ = find(net, SPACE | {"cap": {quantity: 0.5}})
    for group in groups.values():
        values = getattr(group, quantity)
        assert (values <= 0.5 * getattr(group.layers[0], quantity)).all()
        assert DENSE not in group.choices  # it would keep all
    assert "a" in groups


def test_rules_explicit_ranks_and_layers_left_dense(net: nn.Module) -> None:
    rules = [
        {"match": "stem", "dense": True},
        {"match": "a", "explicit": [{"method": "svd", "ranks": {"rank": 3}}], "allow_dense": False},
        {"match": "b", "rank_multiple": 4, "keep": [0.5], "methods": ["svd"]},
        {"match": "kind:linear", "methods": []},
    ]
    groups, _ = find(net, SPACE | {"rules": rules})
    assert "stem" not in groups
    assert groups["a"].choices == (LayerChoice("svd", {"rank": 3}),)
    assert groups["b"].choices[0] == DENSE
    assert [c.ranks["rank"] for c in groups["b"].choices[1:]] == [4]
    assert "fc" not in groups


def test_without_dense_a_layer_that_nothing_fits_stays_dense(net: nn.Module) -> None:
    groups, _ = find(net, SPACE | {"methods": ["svd"], "allow_dense": False})
    assert "depthwise" not in groups
    assert all(DENSE not in g.choices for g in groups.values())


def test_a_refused_decomposition_is_left_out(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    way = type(method("svd"))
    original = way.stage_weights

    def refusing(self: Any, layer: Any, factors: Any, ranks: Mapping[str, int]) -> list[Tensor]:
        if layer.name == "a" and ranks["rank"] > 2:
            raise RefusedDecomposition(f"{layer.name}: no good\nat all")
        return original(self, layer, factors, ranks)

    monkeypatch.setattr(way, "stage_weights", refusing)
    groups, _ = find(net, SPACE | {"methods": ["svd"]})
    assert all(c.ranks["rank"] <= 2 for c in groups["a"].choices if c != DENSE)
    assert any("svd(rank=" in key and why == "a: no good at all" for key, why in groups["a"].refused.items())
    assert any(c.ranks["rank"] > 2 for c in groups["b"].choices if c != DENSE)
    tied, _ = find(net, SPACE | {"methods": ["svd"], "tied": [["a", "b"]]})
    assert all(c.ranks["rank"] <= 2 for c in tied["a"].choices if c != DENSE)


def test_cp_and_the_ring_are_offered(net: nn.Module) -> None:
    space = {"methods": ["cp", "tensor_ring"], "keep": [0.3], "rules": [{"match": ["stem", "up"], "dense": True}]}
    groups, factors = find(net, space)
    assert {c.method for c in groups["a"].choices} == {"dense", "cp", "tensor_ring"}
    predicted, found = measured(net, groups, factors, DATA[0].args[0])
    assert spearmanr(predicted, found).statistic > 0.5


class Heads(nn.Module):
    """Two outputs, of which the first is judged; a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)
        self.out, self.boxes = nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            h = torch.relu(self.frozen(x))
        h = torch.relu(self.a(h)).mean((2, 3))
        return self.out(h), self.boxes(h)


def test_what_the_judged_output_does_not_see_stays_dense() -> None:
    torch.manual_seed(0)
    groups, _ = find(Heads().eval())
    assert sorted(groups) == ["a", "out"]


def test_half_precision_models(net: nn.Module) -> None:
    import copy

    half = copy.deepcopy(net).bfloat16()
    groups, factors = find_dtype(half, torch.bfloat16)
    built = apply(half, Plan({n: g.choices[-1] for n, g in groups.items()}), factors)
    assert all(p.dtype == torch.bfloat16 for p in built.parameters())


def find_dtype(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Group], Factors]:
    x = DATA[0].args[0][:64].to(dtype)
    layers = find_layers(model, EXAMPLE.to(dtype))
    spaces = resolve(load_space(SPACE), layers)
    groups, factors = candidates(model, layers, spaces, [], as_batches(x), Divergence())
    return {g.name: g for g in groups}, factors


def test_no_layers_no_groups() -> None:
    assert find(nn.Sequential(nn.Flatten()), batches=DATA[:1])[0] == {}
