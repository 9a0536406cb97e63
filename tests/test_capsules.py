"""Capsule layers: routing against loops written out, methods against the dense layer, costs against the counter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankopt
from rankopt.block_samples import BlockSample, BlockSamples
from rankopt.decompositions import method, table
from rankopt.decompositions.capsule_votes import CapsuleVotes
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.layers import find_layers
from rankopt.nn.capsules import (
    CapsuleLayer,
    PrimaryCapsules,
    lengths,
    log_odds,
    margin_loss,
    squash,
)
from rankopt.nn.factored_capsules import FactoredCapsules, Network, routing_orders
from rankopt.plan import LayerChoice, Plan
from rankopt.rank_split import every_count, split

METHODS = [name for name, way in table().items() if isinstance(way, CapsuleVotes)]
# in_caps, out_caps, d_out, d_in, iterations, types: usual, prime, one capsule on either side, one of everything
SIZES = [(12, 5, 4, 3, 3, 2), (7, 3, 5, 2, 2, 1), (14, 1, 3, 7, 3, 2), (1, 6, 4, 5, 3, 1), (1, 1, 1, 1, 1, 1)]


def _loop(weight: Tensor, u: Tensor, iterations: int, mask: Tensor | None = None) -> Tensor:
    """Procedure 1 of the paper for one sample (in_caps, d_in), capsule by capsule."""
    in_caps, out_caps = weight.shape[:2]
    votes = [[weight[i, j] @ u[i] for j in range(out_caps)] for i in range(in_caps)]
    b = [[torch.zeros((), dtype=u.dtype) for _ in range(out_caps)] for _ in range(in_caps)]
    v: list[Tensor] = []
    for n in range(iterations):
        c = [torch.softmax(torch.stack(row), 0) for row in b]
        v = []
        for j in range(out_caps):
            s = sum(c[i][j] * votes[i][j] for i in range(in_caps) if mask is None or bool(mask[i]))
            s = s if isinstance(s, Tensor) else torch.zeros(weight.shape[2], dtype=u.dtype)
            size = float((s.detach() ** 2).sum())
            v.append(s * 0 if size == 0 else (s * s).sum() / (1 + (s * s).sum()) * s / (s * s).sum().sqrt())
        if n < iterations - 1:
            b = [[b[i][j] + votes[i][j] @ v[j] for j in range(out_caps)] for i in range(in_caps)]
    return torch.stack(v)


def _layer(sizes: tuple[int, ...], data: bool = True) -> tuple[CapsuleLayer, LayerSpec, Tensor, Metric, Tensor]:
    """A layer in double precision, its spec, weight and metric, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(sizes))
        i, j, d, e, iterations, types = sizes
        module = CapsuleLayer(i, j, d, e, iterations, types).double()
        nn.init.normal_(module.votes.weight)
        u = torch.randn(3, i, e, dtype=torch.float64) * torch.rand(i, 1, dtype=torch.float64)
    (layer,) = find_layers(nn.Sequential(module), u)
    weight = kind_named(layer).weight(layer, module).detach()
    metric = Metric(patch=torch.einsum("nie,nif->ief", u, u) / len(u)) if data else Metric()
    return module, layer, weight, metric, u


def _some_ranks(way: CapsuleVotes, layer: LayerSpec) -> list[dict[str, int]]:
    full = way.rank_bounds(layer)
    found = [full, dict.fromkeys(full, 1), {n: (b + 1) // 2 for n, b in full.items()}]
    return [r for n, r in enumerate(found) if r not in found[:n]]


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_routing_is_that_of_a_plain_loop(iterations: int) -> None:
    torch.manual_seed(iterations)
    layer = CapsuleLayer(5, 3, 4, 2, iterations).double()
    nn.init.normal_(layer.votes.weight)
    u = torch.randn(2, 5, 2, dtype=torch.float64)
    expected = torch.stack([_loop(layer.votes.weight, sample, iterations) for sample in u])
    torch.testing.assert_close(layer(u), expected)


def test_masked_capsules_count_nothing_and_batches_may_have_any_shape() -> None:
    torch.manual_seed(0)
    layer = CapsuleLayer(6, 3, 4, 2).double()
    u, mask = torch.randn(2, 3, 6, 2, dtype=torch.float64), torch.rand(2, 3, 6) > 0.4
    mask[0, 0] = False
    out = layer(u, mask)
    pairs = zip(u.flatten(0, 1), mask.flatten(0, 1), strict=True)
    expected = torch.stack([_loop(layer.votes.weight, a, 3, m) for a, m in pairs])
    torch.testing.assert_close(out, expected.unflatten(0, (2, 3)))
    assert torch.equal(out[0, 0], torch.zeros(3, 4, dtype=torch.float64))
    changed = torch.where(mask[..., None], u, torch.full_like(u, 7.0))
    torch.testing.assert_close(layer(changed, mask), out)
    torch.testing.assert_close(layer(u[1, 2], mask[1, 2]), out[1, 2])
    assert layer(u.flatten(0, 1)[:0]).shape == (0, 3, 4)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_squash_keeps_the_direction_and_is_finite(values: list[float]) -> None:
    s = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    v = squash(s)
    norm = float(s.detach().norm())
    assert float(v.detach().norm()) == pytest.approx(norm**2 / (1 + norm**2), abs=1e-12)
    torch.testing.assert_close(v.detach() * norm, s.detach() * v.detach().norm(), atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(v.sum(), s)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_give_finite_values_and_gradients_in_every_dtype(dtype: torch.dtype) -> None:
    s = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(squash(s).sum(), s)
    assert torch.equal(squash(s), torch.zeros_like(s))
    assert torch.equal(gradient, torch.zeros_like(s))
    layer = CapsuleLayer(4, 3, 5, 2).to(dtype)
    u = torch.zeros(2, 4, 2, dtype=dtype, requires_grad=True)
    scores = lengths(layer(u))
    margin_loss(log_odds(scores).sigmoid(), torch.tensor([0, 2])).backward()
    assert scores.dtype == dtype
    assert all(torch.isfinite(g).all() for g in (u.grad, layer.votes.weight.grad) if g is not None)


def test_primary_capsules_stand_type_after_type() -> None:
    torch.manual_seed(0)
    primary = PrimaryCapsules(3, types=4, dim=5, kernel_size=3, stride=2)
    x = torch.randn(2, 3, 9, 7)
    y, capsules = primary.conv(x), primary(x)
    assert capsules.shape == (2, 4 * 4 * 3, 5)
    torch.testing.assert_close(capsules[1, 2 * 12 + 7], squash(y[1, 10:15, 2, 1]))


def test_margin_loss_is_that_of_the_paper() -> None:
    scores, labels = torch.tensor([[0.95, 0.3], [0.2, 0.4]]), torch.tensor([0, 1])
    expected = (0 + 0.5 * 0.2**2 + 0.5**2 + 0.5 * 0.1**2) / 2
    assert float(margin_loss(scores, labels)) == pytest.approx(expected)
    several = torch.tensor([[1, 0], [0, 1]])
    assert float(margin_loss(scores, several)) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "value"), [("in_caps", 0), ("iterations", 0), ("d_out", 1.5), ("types", 4)])
def test_impossible_layers_are_refused(name: str, value: Any) -> None:
    sizes: dict[str, Any] = {"in_caps": 6, "out_caps": 3, "d_out": 4, "d_in": 2, "iterations": 3, name: value}
    with pytest.raises(ValueError, match=name):
        CapsuleLayer(**sizes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_methods_compute_what_the_dense_layer_computes_at_the_cost_they_say(name: str, sizes: tuple[int, ...]) -> None:
    """Outputs, gradients, MACs and parameters at several ranks, against the dense layer holding the product."""
    _, layer, weight, metric, u = _layer(sizes)
    way: Any = method(name)
    factors = way.factorize(layer, weight, metric)
    i, j, d, e, _, types = sizes
    solved = []
    for ranks in _some_ranks(way, layer):
        way.check(layer, ranks)
        weights = way.stage_weights(layer, factors, ranks)
        assert [tuple(w.shape) for w in weights] == way.stage_shapes(layer, ranks)
        assert way.ranks_of(layer, weights) == ranks
        built = way.build(layer, weights, None)
        dense = CapsuleLayer(i, j, d, e, ranks["iterations"], types).double()
        product = way.reconstruct(layer, weights)
        dense.load_state_dict(kind_named(layer).state(layer, product, None))
        a, b = u.clone().requires_grad_(), u.clone().requires_grad_()
        mask = torch.ones(len(u), i, dtype=torch.bool)
        mask[0, 0] = i == 1
        for given_mask in (None, mask):
            torch.testing.assert_close(built(a, given_mask), dense(b, given_mask), atol=1e-9, rtol=1e-9)
        built(a).sin().sum().backward()
        dense(b).sin().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-8)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in built.parameters())
        counted = rankopt.count(built, u)
        assert (counted.macs, counted.params) == (way.macs(layer, ranks), way.params(layer, ranks))
        read = way.weights_of(layer, ranks, built)
        assert all(torch.equal(r, w) for r, w in zip(read, weights, strict=True))
        blank = way.skeleton(layer, ranks, torch.float64, "cpu")
        blank.load_state_dict(built.state_dict())
        assert torch.equal(blank(u), built(u))
        solved.append(ranks)
    stacked = {n: np.array([r[n] for r in solved], dtype=np.int32) for n in solved[0]}
    for cost in (way.params, way.macs):
        assert cost(layer, stacked).tolist() == [cost(layer, r) for r in solved]


@pytest.mark.parametrize("data", [False, True], ids=["plain", "whitened"])
@pytest.mark.parametrize("name", [n for n in METHODS if method(n).exact])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact_methods_give_back_the_layer_at_full_rank(name: str, sizes: tuple[int, ...], data: bool) -> None:
    module, layer, weight, metric, u = _layer(sizes, data)
    way: Any = method(name)
    full = way.rank_bounds(layer)
    weights = way.stage_weights(layer, way.factorize(layer, weight, metric), full)
    torch.testing.assert_close(way.build(layer, weights, None)(u), module(u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_more_rank_loses_less_and_data_help(name: str) -> None:
    """Errors of the votes on the data themselves, where inputs are strongly correlated."""
    torch.manual_seed(1)
    sizes = (12, 4, 6, 5, 3, 2)
    _, layer, weight, _, _ = _layer(sizes)
    mix = torch.randn(12, 5, 5, dtype=torch.float64) * torch.arange(1, 6, dtype=torch.float64) ** -2.0
    u = torch.einsum("ief,nif->nie", mix, torch.randn(200, 12, 5, dtype=torch.float64))
    metric = Metric(patch=torch.einsum("nie,nif->ief", u, u) / len(u))
    way: Any = method(name)
    errors: dict[bool, list[float]] = {False: [], True: []}
    full = way.rank_bounds(layer)
    if len(full) == 1:
        pytest.skip("it has no rank")
    for data in (False, True):
        factors = way.factorize(layer, weight, metric if data else Metric())
        steps = [{**{n: max(1, b * k // 4) for n, b in full.items()}, "iterations": 3} for k in (1, 2, 4)]
        for ranks in steps:
            change = way.reconstruct(layer, way.stage_weights(layer, factors, ranks)) - weight
            errors[data].append(float(torch.einsum("ief,nif->nie", change, u).square().sum()))
        lost = [float(way.lost(factors, ranks)) for ranks in steps]
        assert lost == sorted(lost, reverse=True)
        assert errors[data][0] > errors[data][1] > errors[data][2] - 1e-9
    assert errors[True][0] <= errors[False][0] * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_replaced_layers_keep_dtype_and_mode(name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(CapsuleLayer(6, 3, 4, 5, 3, 2)).to(dtype)
    u = torch.randn(2, 6, 5).to(dtype)
    (layer,) = find_layers(model, u)
    ranks = {n: (b + 1) // 2 for n, b in method(name).rank_bounds(layer).items()}
    small = rankopt.apply(model, Plan({"0": LayerChoice(name, ranks)}))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(u).dtype == dtype
    assert torch.isfinite(small(u)).all()
    assert all(buffer.dtype == torch.int64 for buffer in small.buffers())


def test_only_capsule_methods_fit_capsules_and_they_fit_nothing_else() -> None:
    model = nn.Sequential(CapsuleLayer(1, 3, 4, 5), nn.Flatten(1), nn.Linear(12, 4))
    capsules, linear = find_layers(model, torch.randn(2, 1, 5))
    assert (capsules.kind, linear.kind) == ("capsules", "linear")
    for name, way in table().items():
        assert (way.why_not(capsules) is None) == (name in METHODS)
        assert name not in METHODS or way.why_not(linear)
    with pytest.raises(LayerError, match="iterations <= 3"):
        method("caps_svd").check(capsules, {"rank": 1, "iterations": 4})


def test_a_subclass_and_odd_weights_are_left_alone() -> None:
    class Own(CapsuleLayer):
        pass

    shared = CapsuleLayer(4, 4, 3, 3)
    model = nn.Sequential(Own(4, 4, 3, 3), shared, CapsuleLayer(4, 4, 3, 3))
    model[2].votes = shared.votes
    reasons = [layer.skip for layer in find_layers(model, torch.randn(2, 4, 3))]
    assert reasons[0] is not None
    assert "subclass" in reasons[0]


def test_the_order_is_the_cheapest_of_all_that_were_tried() -> None:
    """Against every choice of what is multiplied once, priced one by one; parameters and MACs go different ways."""
    sizes = {"i": 1152, "j": 10, "d": 16, "e": 8}
    dense = routing_orders(Network(("ijde",)), sizes, 3).macs
    assert dense == 1152 * 160 * (8 + 5)
    shared = routing_orders(Network(("tkjde",), "tkm"), sizes | {"t": 32, "k": 1, "m": 36}, 3)
    assert shared.once == ()  # the votes are never formed
    assert shared.macs == 3 * (1152 * 10 * 8 + 32 * 1280) + 2 * (32 * 1280 + 1152 * 10 * 8)
    formed = 1152 * 160 * (8 + 5)
    assert shared.macs < 0.3 * formed
    few = routing_orders(Network(("ip", "jq", "pqde")), sizes | {"p": 6, "q": 4}, 3)
    params = 1152 * 6 + 10 * 4 + 24 * 128
    assert params < 0.01 * 1152 * 1280
    assert few.macs > 0.5 * formed


@given(st.tuples(*(st.integers(1, 5),) * 4), st.integers(1, 3), st.data())
@settings(max_examples=15, deadline=None)
def test_any_network_in_any_order_gives_the_same(sizes: tuple[int, int, int, int], iterations: int, data: Any) -> None:
    name = data.draw(st.sampled_from([n for n in METHODS if n != "caps_cp"]))
    _, layer, weight, metric, u = _layer((*sizes, iterations, 1))
    way: Any = method(name)
    ranks = {n: data.draw(st.integers(1, b)) for n, b in way.rank_bounds(layer).items()}
    built = way.build(layer, way.stage_weights(layer, way.factorize(layer, weight, metric), ranks), None)
    dense = CapsuleLayer(*sizes, ranks["iterations"]).double()
    product = way.reconstruct(layer, way.weights_of(layer, ranks, built))
    dense.load_state_dict(kind_named(layer).state(layer, product, None))
    torch.testing.assert_close(built(u), dense(u), atol=1e-9, rtol=1e-9)


def test_iterations_are_counted_out_and_the_rank_is_split_for_each() -> None:
    _, layer, weight, metric, _ = _layer((12, 5, 4, 3, 3, 2))
    way: Any = method("caps_svd")
    assert every_count(way, layer) == [{"iterations": n} for n in (3, 2, 1)]
    factors = way.factorize(layer, weight, metric)
    assert split(way, layer, factors, [0.9])[0.9]["iterations"] == 3
    for count in every_count(way, layer):
        found = split(way, layer, factors, [0.3, 0.9], counts=count)
        assert all(ranks["iterations"] == count["iterations"] for ranks in found.values())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.primary = PrimaryCapsules(1, 4, 4, 3, 2)
        self.digits = CapsuleLayer(36, 5, 6, 4, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return log_odds(lengths(self.digits(self.primary(x))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    model = _Net()
    nn.init.normal_(model.digits.votes.weight, std=0.4)
    nn.init.normal_(model.primary.conv.weight, std=0.5)
    return model.eval()


SPACE: dict[str, Any] = {
    "methods": ["svd"],
    "keep": [0.3, 0.6],
    "rules": [{"match": "kind:capsules", "methods": METHODS, "keep": [0.1, 0.5]}],
}


def test_the_prediction_is_exact_to_first_order_and_counts_iterations(net: nn.Module) -> None:
    torch.manual_seed(0)
    u, g = torch.randn(4, 36, 4), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        out = net.digits(u)  # type: ignore[operator]
        fewer = copy.deepcopy(net.digits)
        fewer.iterations = 1  # type: ignore[union-attr]
        change = fewer(u) - out
    samples = BlockSamples((BlockSample((u,), {}, out, g, 4),))
    expected = float((g * change).sum((2, 3)).square().mean() / 2)
    assert samples.loss(fewer) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_search_saves_loads_and_exports(net: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    images = torch.randn(96, 1, 7, 7)
    result = rankopt.search(
        net, images[:1], calibration=images, limits=["macs<=70%", "params<=60%"], trials=3, space=SPACE, seed=0
    )
    best = result.best()
    assert best.plan["digits"].method in METHODS
    small = best.build()
    counted = rankopt.count(small, images[:1])
    assert (counted.macs, counted.params) == (best.measurements["macs"], best.measurements["params"])
    best.save(tmp_path / "small", exports=["onnx", "pt2"])
    again = rankopt.load(tmp_path / "small", net)
    assert torch.equal(again(images[:8]), small(images[:8]))
    alone = rankopt.load(tmp_path / "small", standalone=True)
    torch.testing.assert_close(alone(images[:5]), small(images[:5]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_exported_with_a_free_batch_size(name: str, net: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = next(la for la in find_layers(net, torch.randn(1, 1, 7, 7)) if la.kind == "capsules")
    ranks = {n: max(1, b * 2 // 3) for n, b in method(name).rank_bounds(layer).items()}
    ranks = {n: min(r, 7) for n, r in ranks.items()}
    small = rankopt.apply(net, Plan({"digits": LayerChoice(name, ranks)}))
    x = torch.randn(3, 1, 7, 7)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        small, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, input_names=["x"]
    )
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for n in (1, 3, 5):
        x = torch.randn(n, 1, 7, 7)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), atol=1e-4, rtol=1e-4)


def test_a_trained_chain_goes_back_into_the_dense_shape(net: nn.Module) -> None:
    images = torch.randn(64, 1, 7, 7)
    plan = Plan({"digits": LayerChoice("caps_tucker", {"rank_in": 9, "rank_out": 4, "iterations": 3})})
    small = rankopt.apply(net, plan)
    trained = rankopt.recover(small, net, images, plan=plan, steps=5, batch=32).model
    assert isinstance(trained.digits, FactoredCapsules)
    assert not torch.equal(trained.digits.factors[0], small.digits.factors[0])  # type: ignore[union-attr,index]
    dense = rankopt.merged(net, trained, plan)
    torch.testing.assert_close(dense(images[:8]), trained(images[:8]), atol=1e-4, rtol=1e-4)
