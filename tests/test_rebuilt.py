"""Weights that are functions of products: the algorithms, the layers, and their costs against an oracle each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankopt
from rankopt import artifact
from rankopt.chains import chains, merged
from rankopt.decompositions import method, nmd, rebuilt, table
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import Call, LayerSpec, group_weight
from rankopt.layers import find_layers
from rankopt.nn.rebuilt import Rebuilt, cheapest, multiplied
from rankopt.plan import LayerChoice, Plan
from rankopt.recover import recover
from rankopt.surgery import apply
from rankopt.testing import GEOMETRIES, DecompositionContract, correlated_metric, specify

REBUILT = ("relu_svd", "relu_tucker", "relu_cp", "sin_svd")


class _Contract(DecompositionContract):
    """With a short descent: what it reaches is looked at below."""

    # every other one of the usual layers, since nothing is sliced and every rank is solved anew
    geometries = (*GEOMETRIES[::2], GEOMETRIES[-2])

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rebuilt, "_ITERATIONS", 3)
        monkeypatch.setattr(rebuilt, "_SWEEPS", 3)

    def test_any_shape(self) -> None:  # type: ignore[override]
        """The same for other shapes is below."""


class TestReluSvd(_Contract):
    method = "relu_svd"


class TestReluTucker(_Contract):
    method = "relu_tucker"


class TestReluCp(_Contract):
    method = "relu_cp"


class TestSinSvd(_Contract):
    method = "sin_svd"


# ReLU-NMD


def sparse(m: int = 30, n: int = 40, rank: int = 3, seed: int = 0) -> Tensor:
    """max(0, Θ) for a random Θ of low rank."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, rank), (rank, n)))
    return (left @ right).clamp_min(0)


def blocks(x: Tensor, rank: int, **options: Any) -> nmd.Found:
    return nmd.extrapolated(x, nmd.truncated(x, rank), nmd.matrix_step, lambda f: f[0] @ f[1], **options)


def plain_blocks(x: Tensor, rank: int, **options: Any) -> nmd.Found:
    return nmd.three_block(x, rank, momentum=0.0, **options)


MONOTONE = [nmd.naive, nmd.accelerated, plain_blocks, blocks]


@pytest.mark.parametrize("algorithm", [*MONOTONE, nmd.three_block], ids=lambda f: f.__name__)
def test_residuals_are_those_of_the_latent_form(algorithm: Callable[..., nmd.Found]) -> None:
    """At the end, by NumPy: Z is X where that is positive, and else the negative part of Θ."""
    x = sparse()
    found = algorithm(x, 2, steps=15)
    theta, data = (found.factors[0] @ found.factors[1]).numpy(), x.numpy()
    z = np.where(data > 0, data, np.minimum(theta, 0))
    assert np.linalg.matrix_rank(theta) <= 2
    assert min(found.residuals) == pytest.approx(np.linalg.norm(z - theta) / np.linalg.norm(data), rel=1e-6)
    assert np.allclose(np.maximum(z, 0), data)


@pytest.mark.parametrize("algorithm", MONOTONE, ids=lambda f: f.__name__)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_objective_never_rises(algorithm: Callable[..., nmd.Found], data: st.DataObject) -> None:
    m, n = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(m, n, generator=generator, dtype=torch.float64).clamp_min(data.draw(st.sampled_from([0.0, 0.5])))
    x = torch.where(x == 0.5, 0.0, x)
    found = algorithm(x, data.draw(st.integers(1, min(m, n))), steps=30)
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in pairwise(found.residuals))
    assert all(torch.isfinite(f).all() for f in found.factors)


@pytest.mark.parametrize("algorithm", [*MONOTONE, nmd.three_block], ids=lambda f: f.__name__)
def test_a_planted_matrix_is_found_where_svd_fails(algorithm: Callable[..., nmd.Found]) -> None:
    x = sparse()
    found = algorithm(x, 3, steps=1500)
    theta = found.factors[0] @ found.factors[1]
    values = torch.linalg.svdvals(x)
    by_svd = float(values[3:].square().sum().sqrt() / values.square().sum().sqrt())
    error = float((x - theta.clamp_min(0)).norm() / x.norm())
    assert by_svd > 0.2
    assert error < 0.4 * by_svd


def test_extrapolation_takes_fewer_steps() -> None:
    x = sparse(60, 80, 6, seed=3)
    slow, fast = nmd.naive(x, 6, steps=60), nmd.accelerated(x, 6, steps=60)
    assert fast.residuals[-1] < 0.7 * slow.residuals[-1]
    assert blocks(x, 6, steps=60).residuals[-1] < 0.7 * plain_blocks(x, 6, steps=60).residuals[-1]


@pytest.mark.parametrize("step", [nmd.cp_step, nmd.tucker_step], ids=lambda f: f.__name__)
def test_block_steps_on_tensors_never_raise_the_error(step: Callable[[Tensor, list[Tensor]], list[Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 6, 5, generator=generator, dtype=torch.float64)
    ranks = (4, 4, 4) if step is nmd.cp_step else (3, 4, 2)
    factors = [torch.randn(n, r, generator=generator, dtype=torch.float64) for n, r in zip(z.shape, ranks, strict=True)]
    if step is nmd.tucker_step:
        factors = [torch.zeros(ranks, dtype=torch.float64), *factors]
    errors = []
    for _ in range(12):
        factors = step(z, factors)
        errors.append(float((z - multiplied([f[None] for f in factors])[0]).norm()))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < float(z.norm())


# products


def test_products_against_einsum() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    a, b = random(5, 3), random(3, 7)
    torch.testing.assert_close(multiplied([a, b]), torch.einsum("gar,grb->gab", a, b))
    sides = [random(5, 3), random(4, 3), random(6, 3)]
    torch.testing.assert_close(multiplied(sides), torch.einsum("gar,gbr,gcr->gabc", *sides))
    for shape in ((2, 3, 4), (5, 1, 2), (1, 1, 1)):
        core, sides = random(*shape), [random(n, r) for n, r in zip((5, 4, 6), shape, strict=True)]
        torch.testing.assert_close(multiplied([core, *sides]), torch.einsum("gpqs,gap,gbq,gcs->gabc", core, *sides))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_the_cheapest_order_is_found_and_counted(sizes: list[int], ranks: list[int]) -> None:
    core = torch.randn(1, *ranks)
    sides = [torch.randn(1, n, r) for n, r in zip(sizes, ranks, strict=True)]
    order, macs = cheapest(sizes, ranks)
    assert macs == rankopt.count(_Product(), (core, *sides)).macs
    by_hand = []
    for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        first = sizes[a] * ranks[a] * ranks[b] * ranks[c]
        second = sizes[a] * sizes[b] * ranks[b] * ranks[c]
        by_hand.append(first + second + sizes[a] * sizes[b] * sizes[c] * ranks[c])
    assert macs == min(by_hand)
    assert sorted(order) == [0, 1, 2]


class _Product(nn.Module):
    def forward(self, *factors: Tensor) -> Tensor:
        return multiplied(factors)


# layers


def random_conv(out: int = 12, inp: int = 10) -> tuple[LayerSpec, Tensor]:
    torch.manual_seed(0)
    module = nn.Conv2d(inp, out, 3, padding=1).double()
    layer = specify(module, torch.randn(1, inp, 6, 6, dtype=torch.float64))
    return layer, group_weight(layer, module.weight.detach())


def solved(name: str, layer: LayerSpec, weight: Tensor, metric: Metric, ranks: dict[str, int]) -> float:
    """The relative error that a method leaves in a metric."""
    way = method(name)
    weights = way.stage_weights(layer, way.factorize(layer, weight, metric), ranks)
    return float(metric.error(weight - way.reconstruct(layer, weights)) / metric.error(weight))


@pytest.mark.parametrize("known", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize(("name", "twin"), [("relu_svd", "svd"), ("sin_svd", "svd"), ("relu_cp", "cp")])
def test_never_worse_than_the_linear_twin_of_the_same_rank(name: str, twin: str, known: bool) -> None:
    layer, weight = random_conv()
    metric = correlated_metric(layer).without_gradient() if known else Metric()
    for rank in (2, 5):
        linear = solved(twin, layer, weight, metric, {"rank": rank})
        assert solved(name, layer, weight, metric, {"rank": rank}) <= linear * (1 + 1e-6)
    if name.startswith("relu"):
        assert solved(name, layer, weight, metric, {"rank": 5}) < 0.99 * linear


def test_relu_beats_truncated_svd_at_equal_parameters() -> None:
    """Random weights: at half the parameters, the smaller side doubled and the rank lower by as much."""
    layer, weight = random_conv(24, 20)
    ranks = {}
    for name in ("svd", "relu_svd"):
        way = method(name)
        bound = way.rank_bounds(layer)["rank"]
        ranks[name] = max(r for r in range(1, bound + 1) if way.params(layer, {"rank": r}) <= layer.params / 2)
    assert ranks["relu_svd"] < ranks["svd"]
    errors = {name: solved(name, layer, weight, Metric(), {"rank": r}) for name, r in ranks.items()}
    assert errors["relu_svd"] < 0.95 * errors["svd"]


@pytest.mark.parametrize("side", [1, 2], ids=["outputs", "inputs"])
def test_a_planted_weight_is_found(side: int) -> None:
    """A weight that is the difference of two rectified matrices with one common factor, which svd can't write."""
    generator = torch.Generator().manual_seed(1)
    out, inp = (8, 20) if side == 1 else (20, 8)
    layer = LayerSpec("fc", "linear", inp, out, calls=(Call(1, (), ()),))
    factors = [torch.randn(1, out, 2, generator=generator), torch.randn(1, 2, inp, generator=generator)]
    factors[side - 1] = torch.cat([factors[side - 1], torch.randn(factors[side - 1].shape, generator=generator)], side)
    upper, lower = (factors[0] @ factors[1]).double().clamp_min(0).chunk(2, side)
    weight = upper - lower
    by_svd = solved("svd", layer, weight, Metric(), {"rank": 2})
    assert by_svd > 0.05
    assert solved("relu_svd", layer, weight, Metric(), {"rank": 2}) < 0.5 * by_svd


@pytest.mark.parametrize("name", REBUILT)
def test_zero_and_one_sided_weights(name: str) -> None:
    """Nothing to fit, and nothing on one side of zero: finite factors, and never worse than linear."""
    layer, weight = random_conv(6, 5)
    way = method(name)
    ranks = {n: min(b, 2) for n, b in way.rank_bounds(layer).items()}
    for given_weight in (weight * 0, weight.abs()):
        weights = way.stage_weights(layer, way.factorize(layer, given_weight, Metric()), ranks)
        assert all(torch.isfinite(w).all() for w in weights)
        left = (given_weight - way.reconstruct(layer, weights)).square().sum()
        assert left <= given_weight.square().sum() * (1 + 1e-9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(8, 6, 3, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.up(torch.relu(self.conv(x)))).mean((2, 3)))


def choices(layers: list[LayerSpec], names: tuple[str, str, str]) -> Plan:
    found = {}
    for layer, name in zip(layers, names, strict=True):
        found[layer.name] = LayerChoice(name, {n: min(b, 2) for n, b in method(name).rank_bounds(layer).items()})
    return Plan(found)


@pytest.fixture
def built() -> tuple[nn.Module, nn.Module, Plan]:
    torch.manual_seed(0)
    net = Net().eval()
    layers = [la for la in find_layers(net, torch.randn(1, 4, 6, 6)) if la.name in ("conv", "up", "fc")]
    plan = choices(layers, ("relu_cp", "relu_tucker", "sin_svd"))
    return net, apply(net, plan), plan


def test_the_net_with_dense_weights_by_hand(built: tuple[nn.Module, nn.Module, Plan]) -> None:
    """Every weight from its factors by einsum, put into the dense classes."""
    net, small, _ = built
    dense: Any = copy.deepcopy(net)
    conv: Any = small.conv
    parts = torch.einsum("gor,gir,gkr->goik", *conv.factors)
    assert conv.side == 2  # four inputs, eight outputs
    weight = parts[0, :, :4].relu() - parts[0, :, 4:].relu()
    dense.conv.weight = nn.Parameter(weight.reshape(8, 4, 3, 3))
    up: Any = small.up
    parts = torch.einsum("gpqs,gop,giq,gks->goik", *up.factors)
    weight = parts[0, :6].relu() - parts[0, 6:].relu()
    dense.up.weight = nn.Parameter(weight.reshape(6, 8, 3, 3).transpose(0, 1))
    fc: Any = small.fc
    amplitude, left, right = fc.factors
    dense.fc.weight = nn.Parameter((amplitude[:, None, None] * torch.sin(left @ right))[0])
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    for name in ("conv", "up", "fc"):
        torch.testing.assert_close(getattr(small, name).weight, getattr(dense, name).weight, rtol=1e-4, atol=1e-5)


def test_saved_trained_and_put_back(built: tuple[nn.Module, nn.Module, Plan], tmp_path: Path) -> None:
    net, small, plan = built
    x = torch.randn(48, 4, 6, 6)
    before = float((small(x) - net(x)).detach().square().mean())
    trained = recover(
        small, net, x, plan=plan, steps=40, batch=24, lr=0.02, ema=0, decay_on="product", orthogonality=0.1,
        timing=False,
    ).model  # fmt: skip
    assert float((trained(x) - net(x)).detach().square().mean()) < before
    for chain in chains(net, trained, plan):
        assert isinstance(chain.modules, Rebuilt)
        assert not torch.equal(chain.product(), chains(net, small, plan)[0].product())
    artifact.save(tmp_path / "saved", trained, plan, measurements={})
    assert torch.equal(artifact.load(tmp_path / "saved", Net)(x), trained(x))
    dense = merged(net, trained, plan)  # any of these weights is a dense one, trained or not
    torch.testing.assert_close(dense(x), trained(x), rtol=1e-4, atol=1e-5)
    assert rankopt.count(dense, x[:1]).macs == rankopt.count(net, x[:1]).macs < rankopt.count(trained, x[:1]).macs


@pytest.mark.parametrize("name", ["pt2", "onnx"])
def test_exports(built: tuple[nn.Module, nn.Module, Plan], name: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    x = torch.randn(2, 4, 6, 6)
    record = rankopt.export(built[1], tmp_path, [name], x)[name]  # checked on fresh inputs
    assert record["difference"] <= record["tolerance"]
    assert record["any_batch"]


@pytest.mark.parametrize("name", REBUILT)
def test_an_onnx_file_holds_the_factors_and_not_their_product(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3))
    (_, layer) = find_layers(net, torch.randn(1, 12, 6, 6))
    small = apply(
        net, Plan({"2": LayerChoice(name, {n: min(b, 3) for n, b in method(name).rank_bounds(layer).items()})})
    )
    rankopt.export(small, tmp_path, ["onnx"], torch.randn(2, 12, 6, 6))
    held = sum(int(np.prod(i.dims)) for i in onnx.load(tmp_path / "model.onnx").graph.initializer)
    own = sum(p.numel() for p in small.parameters())
    assert own < sum(p.numel() for p in net.parameters()) / 1.4
    assert own <= held < own + 40  # shapes


def test_a_search_for_storage_chooses_them() -> None:
    """Parameters fall below the limit while MACs rise; what is stated is what the built model has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)).eval()
    x = torch.randn(120, 24)
    result = rankopt.search(
        net, x[:1], calibration=x, space={"methods": ["relu_svd"], "keep": [0.4, 0.6, 0.8]}, trials=3,
        objectives=["kl", "params"], limits=["params<=80%"],
    )  # fmt: skip
    best = result.best()
    assert {c.method for c in best.plan.changed().values()} == {"relu_svd"}
    counted = rankopt.count(best.build(), x[:1])
    assert counted.params == best.measurements["params"] <= 0.8 * sum(p.numel() for p in net.parameters())
    assert counted.macs == best.measurements["macs"]
    assert best.measurements["macs_kept"] > 1


def test_shares_of_them_are_of_parameters() -> None:
    assert {name for name, way in table().items() if way.saves == ("params",)} >= set(REBUILT)
