"""Matrices turned into tensors: the contract, dense oracles, TensorLy's own decompositions, orders and sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.decompositions.tensorized import TensorizedDecomposition, balanced
from rankopt.errors import LayerError
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.nn.contracted import Contracted
from rankopt.nn.network import Digits, Network
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import apply
from rankopt.testing import MATRICES, DecompositionContract, correlated_metric, specify

NAMES = ("tt_matrix", "tucker_matrix", "cp_matrix", "ring_matrix", "block_term", "hierarchical_tucker")


class TestTtMatrix(DecompositionContract):
    method = "tt_matrix"
    geometries = MATRICES


class TestTuckerMatrix(DecompositionContract):
    method = "tucker_matrix"
    geometries = MATRICES


class TestCpMatrix(DecompositionContract):
    method = "cp_matrix"
    geometries = MATRICES[:3] + MATRICES[4:5]


class TestRingMatrix(DecompositionContract):
    method = "ring_matrix"
    geometries = MATRICES[2:3] + MATRICES[6:]


class TestBlockTerm(DecompositionContract):
    method = "block_term"
    geometries = MATRICES[:3] + MATRICES[4:5]


class TestHierarchicalTucker(DecompositionContract):
    method = "hierarchical_tucker"
    geometries = MATRICES[2:]


class TestTtMatrixMemory(DecompositionContract):
    method = "tt_matrix_memory"
    geometries = MATRICES[:4]


def linear(inputs: int = 24, outputs: int = 30, rows: int = 5) -> tuple[LayerSpec, Tensor]:
    torch.manual_seed(inputs + outputs)
    module = nn.Linear(inputs, outputs).double()
    layer = specify(module, torch.randn(rows, inputs, dtype=torch.float64))
    return layer, kind_named(layer).weight(layer, module).detach()


def way(name: str) -> TensorizedDecomposition:
    found = method(name)
    assert isinstance(found, TensorizedDecomposition)
    return found


# sizes


@given(st.integers(1, 3000), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_balanced_sizes_hold_the_size_with_little_padding(size: int, count: int) -> None:
    found = balanced(size, count)
    assert len(found) == count
    assert size <= math.prod(found)
    assert found == tuple(sorted(found))
    assert found[-1] <= 2 * found[0]
    smaller = itertools.combinations_with_replacement(range(found[0], found[-1] + 1), count)
    assert all(not size <= math.prod(f) < math.prod(found) or f[-1] > 2 * f[0] for f in smaller)


@pytest.mark.parametrize(
    ("size", "count", "sizes"), [(7, 2, (2, 4)), (64, 3, (4, 4, 4)), (512, 3, (8, 8, 8)), (50257, 3, (27, 35, 54))]
)
def test_balanced_examples(size: int, count: int, sizes: tuple[int, ...]) -> None:
    if size == 50257:
        assert math.prod(balanced(size, count)) - size < 0.01 * size
    else:
        assert balanced(size, count) == sizes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_digits_are_those_of_numpy(bases: list[int]) -> None:
    rows = np.arange(math.prod(bases))
    expected = np.unravel_index(rows, bases)
    for found, wanted in zip(Digits(bases).of(torch.from_numpy(rows)), expected, strict=True):
        assert np.array_equal(found.numpy(), wanted)


# orders


def cheapest_by_trying(operands: list[tuple[str, bool]], result: str, sizes: Mapping[str, Any]) -> int:
    """The fewest multiplications of any way to merge two operands after another, one of which carries data."""
    if len(operands) == 1:
        return 0
    best = None
    for (a, (left, first)), (b, (right, second)) in itertools.combinations(enumerate(operands), 2):
        if not (first or second):
            continue
        rest = [operand for n, operand in enumerate(operands) if n not in (a, b)]
        needed = set(result).union(*(letters for letters, _ in rest))
        both = "".join(sorted({*left, *right}))
        total = math.prod(int(sizes[x]) for x in both)
        if best is None or total < best:
            merged = ("".join(x for x in both if x in needed), True)
            total += cheapest_by_trying([merged, *rest], result, sizes)
            best = total if best is None else min(best, total)
    assert best is not None
    return best


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["rows", "lookup", "dense"])
def test_the_order_is_the_cheapest_of_all(name: str, form: str) -> None:
    """By trying every sequence of steps, counting with sets; and an array of ranks costs what each of them costs."""
    layer, _ = linear(36, 48)
    d = way(name)
    bounds = d.rank_bounds(layer)
    network = d._network(layer, {n: max(1, b // 3) for n, b in bounds.items()})
    ins = set(network.inputs)
    if form == "rows":
        operands, result = [(network.inputs, True), *((t, False) for t in network.tensors)], network.outputs
    elif form == "lookup":
        operands = [("".join(m for m in t if m not in ins), bool(ins & set(t))) for t in network.tensors]
        result = network.outputs
    else:
        operands, result = [(t, True) for t in network.tensors], network.outputs + network.inputs
    order = getattr(network, form)()
    assert order.products == cheapest_by_trying(operands, result, network.sizes)
    assert 0 < order.macs <= order.products
    some = d._network(layer, {n: np.array([1, max(1, b // 3), b]) for n, b in bounds.items()})
    whole = getattr(some, form)()
    assert (whole.products[1], whole.macs[1]) == (order.products, order.macs)
    assert whole.steps == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_computes_what_einsum_computes(name: str) -> None:
    layer, weight = linear(17, 19)
    d = way(name)
    ranks = {n: (b + 1) // 2 for n, b in d.rank_bounds(layer).items()}
    tensors = d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
    network = d._network(layer, ranks)
    equation = ",".join(network.tensors) + f"->{network.outputs}{network.inputs}"
    whole = np.einsum(equation, *(t.numpy() for t in tensors), optimize=True)
    dense = torch.from_numpy(whole.reshape(math.prod(whole.shape[: len(network.outputs)]), -1))[:19, :17]
    torch.testing.assert_close(d.reconstruct(layer, tensors)[0], dense, rtol=1e-9, atol=1e-9)
    x = torch.randn(4, 17, dtype=torch.float64)
    built = d.build(layer, tensors, None)
    torch.testing.assert_close(built(x), x @ dense.T, rtol=1e-9, atol=1e-9)


# against TensorLy and closed forms


def padded(layer: LayerSpec, weight: Tensor, d: TensorizedDecomposition) -> tuple[Tensor, Any]:
    return d.tensor(layer, weight, {})


@pytest.mark.parametrize("ranks", [(1, 1), (3, 4), (10, 5)])
def test_tt_matrix_is_tensorlys(ranks: tuple[int, int]) -> None:
    layer, weight = linear(64, 72)
    d = way("tt_matrix")
    mine = d.reconstruct(
        layer, d.stage_weights(layer, d.factorize(layer, weight, Metric()), {"rank_1": ranks[0], "rank_2": ranks[1]})
    )
    tensor, (ins, outs) = padded(layer, weight, d)
    pairs = tensor.permute(3, 0, 4, 1, 5, 2).reshape([i * o for i, o in zip(ins, outs, strict=True)])
    theirs = tl.decomposition.tensor_train(pairs.numpy(), rank=[1, *ranks, 1])
    lost_theirs = float(np.square(tl.tt_to_tensor(theirs) - pairs.numpy()).sum())
    lost_mine = float((mine - weight).square().sum())
    # TensorLy truncates from the left as it goes; slices of the whole train may differ a little in both directions.
    assert lost_mine <= 1.05 * lost_theirs
    lost = float(d.lost(d.factorize(layer, weight, Metric()), {"rank_1": ranks[0], "rank_2": ranks[1]}))
    assert lost_mine / float(weight.square().sum()) <= lost + 1e-9


def test_two_modes_are_the_nearest_sum_of_kronecker_products() -> None:
    """Van Loan and Pitsianis: the rearranged matrix's singular values say what is lost."""
    layer, weight = linear(12, 20)
    d = way("tt_matrix")
    (ins, outs), factors = d._modes(layer, {}), d.factorize(layer, weight, Metric())
    rearranged = weight[0].reshape(*outs, *ins).permute(2, 0, 3, 1).reshape(ins[0] * outs[0], -1)
    values = np.linalg.svd(rearranged.numpy(), compute_uv=False) ** 2
    for rank in (1, 4):
        dense = d.reconstruct(layer, d.stage_weights(layer, factors, {"rank_1": rank}))
        assert float((dense - weight).square().sum()) == pytest.approx(values[rank:].sum(), rel=1e-9)


def test_tucker_matrix_is_close_to_tensorlys_iteration() -> None:
    layer, weight = linear(24, 30)
    d = way("tucker_matrix")
    ranks = dict(zip(d.rank_names(layer), (3, 4, 3, 3), strict=True))
    mine = d.reconstruct(layer, d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks))
    tensor, _ = padded(layer, weight, d)
    theirs = tl.tucker_to_tensor(tucker(tensor.numpy(), rank=list(ranks.values())))
    assert float((mine - weight).square().sum()) <= 1.1 * float(np.square(theirs - tensor.numpy()).sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_of_these_ranks_is_found(name: str) -> None:
    """What was made of small ranks is given back at those ranks."""
    layer, _ = linear(32, 36)
    d = way(name)
    ranks = {n: min(2, b) for n, b in d.rank_bounds(layer).items()}
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in d.stage_shapes(layer, ranks)]
    weight = d.reconstruct(layer, tensors)
    found = d.reconstruct(layer, d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks))
    left = float((found - weight).square().sum() / weight.square().sum())
    assert left < (1e-12 if d.exact else 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_polish_spends_the_ranks_where_the_data_are(name: str) -> None:
    layer, weight = linear(32, 36)
    metric = correlated_metric(layer)
    d = way(name)
    ranks = {n: max(1, b // 3) for n, b in d.rank_bounds(layer).items()}
    before = d.stage_weights(layer, d.factorize(layer, weight, metric), ranks)
    after = d.polish(layer, before, weight, metric)
    errors = [float(metric.error(weight - d.reconstruct(layer, t))) for t in (before, after)]
    assert errors[1] < 0.7 * errors[0]


# modes that are given


def test_given_modes_are_used_and_kept() -> None:
    layer, weight = linear(24, 30)
    d = way("tt_matrix")
    modes = {"in_1": 3, "in_2": 8, "out_1": 5, "out_2": 6}
    ranks = {"rank_1": 7, **modes}
    d.check(layer, ranks)
    tensors = d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
    assert [tuple(t.shape) for t in tensors] == [(3, 5, 7), (7, 8, 6)] == d.stage_shapes(layer, ranks)
    assert d.ranks_of(layer, tensors) == ranks
    model = nn.Sequential(nn.Linear(24, 30))
    built = apply(model, Plan({"0": LayerChoice("tt_matrix", {**ranks, "rank_1": 15})}))
    x = torch.randn(3, 24)
    torch.testing.assert_close(built(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ({"rank_1": 2, "in_1": 3}, "needs all of in_1, in_2, out_1, out_2"),
        (
            {"rank_1": 2, "in_1": 3, "in_2": 7, "out_1": 5, "out_2": 6},
            "at least 24 and less than .* got 3 × 7",
        ),
        ({"rank_1": 2, "in_1": 3, "in_2": 99, "out_1": 5, "out_2": 6}, "got 3 × 99"),
        ({"rank_1": 99, "in_1": 3, "in_2": 8, "out_1": 5, "out_2": 6}, "1 <= rank_1 <= 15"),
        ({"in_1": 3, "in_2": 8, "out_1": 5, "out_2": 6}, "needs the ranks rank_1"),
    ],
)
def test_modes_that_do_not_fit_are_refused(ranks: dict[str, int], says: str) -> None:
    layer, _ = linear(24, 30)
    with pytest.raises(LayerError, match=says):
        way("tt_matrix").check(layer, ranks)


def test_convolutions_and_small_layers_are_refused_with_a_reason() -> None:
    conv = specify(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 5, 5))
    assert "only the matrix" in str(way("tt_matrix").why_not(conv))
    small = specify(nn.Linear(3, 40), torch.randn(1, 3))
    assert "side of 3 is too small" in str(way("tt_matrix").why_not(small))
    table = specify(nn.Embedding(40, 30), torch.zeros(2, dtype=torch.long))
    assert "never needed" in str(way("tt_matrix_memory").why_not(table))


# the dense weight


def test_no_forward_pass_makes_the_dense_weight_unless_it_is_asked_to() -> None:
    layer, weight = linear(64, 72, rows=2)
    d, memory = way("tt_matrix"), way("tt_matrix_memory")
    ranks = {"rank_1": 4, "rank_2": 4}
    tensors = d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest.append(out.numel())
            return out

    for one, dense in ((d, False), (memory, True)):
        built = one.build(layer, tensors, None)
        assert isinstance(built, Contracted)
        largest.clear()
        with Watch():
            built(torch.randn(1, 64, dtype=torch.float64))
        assert (max(largest) >= 64 * 72) == dense
    assert memory.macs(layer, ranks) > layer.macs


def test_a_network_may_be_scaled_by_shared_modes() -> None:
    network = Network("a", "A", ("ar", "r", "Ar"), {"a": 3, "A": 4, "r": 2})
    assert network.rows().macs == 3 * 2 + 2 * 4
