"""Every method against the shipped contract, and against what is known of its error in closed form."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.decompositions import cp as cp_module
from rankopt.decompositions import method, table
from rankopt.decompositions.chained import ChainDecomposition
from rankopt.decompositions.decomposition import Decomposition
from rankopt.decompositions.metric import Metric
from rankopt.errors import LayerError, RefusedDecomposition
from rankopt.layer_spec import Call, LayerSpec, group_weight
from rankopt.testing import DecompositionContract, specify

CHAINS = sorted(name for name, way in table().items() if isinstance(way, ChainDecomposition))


class TestSvd(DecompositionContract):
    method = "svd"


class TestSvdIn(DecompositionContract):
    method = "svd_in"


class TestSpatialSvd(DecompositionContract):
    method = "spatial_svd"


class TestTucker2(DecompositionContract):
    method = "tucker2"


class TestTucker(DecompositionContract):
    method = "tucker"


class TestCp(DecompositionContract):
    method = "cp"


class TestTensorTrain(DecompositionContract):
    method = "tensor_train"


class TestTensorRing(DecompositionContract):
    method = "tensor_ring"


def conv(out: int = 8, inp: int = 6, kernel: tuple[int, ...] = (3, 3), groups: int = 1) -> tuple[LayerSpec, Tensor]:
    """A convolution and its weight with the groups in front, in double precision."""
    torch.manual_seed(out * 100 + inp)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    module = kind(inp, out, kernel, padding="same", groups=groups).double()
    layer = specify(module, torch.randn(1, inp, *(8 for _ in kernel), dtype=torch.float64))
    return layer, group_weight(layer, module.weight.detach())


def calibration(channels: int, samples: int = 8, seed: int = 0) -> Tensor:
    """Patches (in·9, positions) of smooth, mixed random images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, 14, 14, generator=generator, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = F.avg_pool2d(torch.einsum("nchw,cd->ndhw", x, mix), 3, stride=1).relu()
    return F.unfold(x, 3).transpose(0, 1).flatten(1)


def error(d: Decomposition, layer: LayerSpec, weight: Tensor, metric: Metric, ranks: dict[str, int]) -> float:
    """The error left in `metric` by a factorization in `metric`."""
    weights = d.stage_weights(layer, d.factorize(layer, weight, metric), ranks)
    return float(metric.error(weight - d.reconstruct(layer, weights)))


def relative(d: Decomposition, layer: LayerSpec, weight: Tensor, ranks: dict[str, int]) -> float:
    """The share of the plain energy that is lost."""
    return error(d, layer, weight, Metric(), ranks) / float(weight.square().sum())


def tail_of(matrix: Tensor, rank: int) -> float:
    """Eckart–Young: what the best matrix of this rank leaves, by NumPy."""
    return float((np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:] ** 2).sum())


# svd


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_error_is_the_optimum(rank: int) -> None:
    layer, weight = conv()
    data = calibration(6)
    metric = Metric(patch=(data @ data.T / data.shape[1])[None])
    outputs = weight[0].flatten(1) @ data / data.shape[1] ** 0.5
    best = tail_of(outputs, rank)
    assert error(method("svd"), layer, weight, metric, {"rank": rank}) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_weighted_by_the_gradient_is_the_optimum(rank: int) -> None:
    layer, weight = conv()
    data, gradients = calibration(6), torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 50, dtype=torch.float64)
    gradients = gradients + 0.1 * torch.randn(8, 50, dtype=torch.float64)
    moment = gradients @ gradients.T / 50
    metric = Metric((data @ data.T / data.shape[1])[None], None, moment[None])
    d = method("svd")
    weights = d.stage_weights(layer, d.factorize(layer, weight, metric), {"rank": rank})
    difference = (weight - d.reconstruct(layer, weights))[0].flatten(1) @ data / data.shape[1] ** 0.5
    left = torch.linalg.cholesky(moment).T
    best = tail_of(left @ weight[0].flatten(1) @ data / data.shape[1] ** 0.5, rank)
    assert float((left @ difference).square().sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("name", CHAINS)
def test_whitening_beats_the_weights_alone(name: str) -> None:
    layer, weight = conv(12, 8)
    data = calibration(8)
    metric = Metric(patch=(data @ data.T / data.shape[1])[None])
    d = method(name)
    ranks = {n: max(1, b // 3) for n, b in d.rank_bounds(layer).items()}
    plain = d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
    assert error(d, layer, weight, metric, ranks) < float(metric.error(weight - d.reconstruct(layer, plain)))


# spatial_svd


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("rank", [1, 2])
def test_spatial_svd_without_data_is_eckart_young(groups: int, rank: int) -> None:
    layer, weight = conv(12, 6, (3, 5), groups)
    matrices = weight.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
    best = sum(tail_of(m, rank) for m in matrices)
    assert error(method("spatial_svd"), layer, weight, Metric(), {"rank": rank}) == pytest.approx(best, rel=1e-9)


# tucker2, tucker


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["tucker2", "tucker"])
def test_tucker_lost_is_the_error(name: str, groups: int) -> None:
    layer, weight = conv(8, 6, (3, 3), groups)
    d = method(name)
    factors, full = d.factorize(layer, weight, Metric()), d.rank_bounds(layer)
    generator = np.random.default_rng(0)
    grid = {n: generator.integers(1, b + 1, 12) for n, b in full.items()}
    lost = d.lost(factors, grid)
    for k in range(12):
        ranks = {n: int(v[k]) for n, v in grid.items()}
        assert lost[k] == pytest.approx(relative(d, layer, weight, ranks), abs=1e-9)


def test_lost_does_not_depend_on_the_order_of_the_names() -> None:
    layer, weight = conv()
    d = method("tucker")
    factors = d.factorize(layer, weight, Metric())
    ranks = {"rank_out": 5, "rank_in": 2, "rank_k1": 1, "rank_k2": 3}
    assert d.lost(factors, dict(reversed(ranks.items()))) == d.lost(factors, ranks)


def test_tucker2_cut_on_one_side_is_the_best_matrix() -> None:
    layer, weight = conv()
    full = method("tucker2").rank_bounds(layer)
    left = error(method("tucker2"), layer, weight, Metric(), {**full, "rank_out": 3})
    assert left == pytest.approx(tail_of(weight[0].flatten(1), 3), rel=1e-9)
    left = error(method("tucker2"), layer, weight, Metric(), {**full, "rank_in": 2})
    assert left == pytest.approx(tail_of(weight[0].transpose(0, 1).flatten(1), 2), rel=1e-9)


def test_tucker2_cut_at_the_output_is_optimal_for_the_data() -> None:
    layer, weight = conv()
    data = calibration(6)
    metric = Metric(patch=(data @ data.T / data.shape[1])[None])
    best = tail_of(weight[0].flatten(1) @ data / data.shape[1] ** 0.5, 3)
    full = method("tucker2").rank_bounds(layer)
    assert error(method("tucker2"), layer, weight, metric, {**full, "rank_out": 3}) == pytest.approx(best, rel=1e-4)


# tensor_train


def test_tensor_train_loses_the_tails_of_its_bonds() -> None:
    layer, weight = conv(5, 4, (3, 2))
    d = method("tensor_train")
    factors, full = d.factorize(layer, weight, Metric()), d.rank_bounds(layer)
    modes, energy = weight[0].permute(1, 2, 3, 0), float(weight.square().sum())
    tails = {}
    for bond, name in enumerate(full, start=1):
        matrix = modes.reshape(int(np.prod(modes.shape[:bond])), -1)
        assert full[name] == min(matrix.shape)
        for rank in range(1, full[name] + 1):
            tails[name, rank] = tail_of(matrix, rank) / energy
            cut = {**full, name: rank}
            assert float(d.lost(factors, cut)) == pytest.approx(tails[name, rank], abs=1e-9)
            assert relative(d, layer, weight, cut) == pytest.approx(tails[name, rank], abs=1e-9)
    ranks = {"rank_1": 3, "rank_2": 6, "rank_3": 4}
    several = [tails[item] for item in ranks.items()]
    assert max(several) <= relative(d, layer, weight, ranks) <= sum(several)
    assert float(d.lost(factors, ranks)) == pytest.approx(sum(several), abs=1e-9)


# tensor_ring


def test_open_ring_is_no_worse_than_tucker2_and_no_better_than_its_unfoldings() -> None:
    layer, weight = conv()
    ring = error(method("tensor_ring"), layer, weight, Metric(), {"rank_1": 1, "rank_2": 3, "rank_3": 4})
    tucker = error(method("tucker2"), layer, weight, Metric(), {"rank_in": 3, "rank_out": 4})
    bound = max(tail_of(weight[0].transpose(0, 1).flatten(1), 3), tail_of(weight[0].flatten(1), 4))
    assert bound <= ring <= tucker * (1 + 1e-9)


def test_ring_lost_is_the_tails_of_the_unfoldings() -> None:
    layer, weight = conv()
    d = method("tensor_ring")
    modes, energy = weight[0].flatten(2), float(weight.square().sum())
    unfoldings = [modes.flatten(1), modes.transpose(0, 1).flatten(1), modes.permute(2, 0, 1).flatten(1)]
    tails = [tail_of(m, r) / energy for m, r in zip(unfoldings, (2 * 3, 2 * 2, 2 * 3), strict=True)]
    lost = d.lost(d.factorize(layer, weight, Metric()), {"rank_1": 2, "rank_2": 2, "rank_3": 3})
    assert float(lost) == pytest.approx(sum(tails), abs=1e-9)


def test_closing_the_ring_helps() -> None:
    layer, weight = conv()
    d = method("tensor_ring")
    lost = [relative(d, layer, weight, {"rank_1": r, "rank_2": 2, "rank_3": 3}) for r in (1, 2)]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ring_recovers_a_ring(seed: int) -> None:
    layer, weight = conv(10, 9)
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 9, 3), (3, 9, 2), (2, 10, 2))]
    ring = torch.einsum("aib,bkc,coa->oik", *cores).reshape(weight.shape)
    assert relative(method("tensor_ring"), layer, ring, {"rank_1": 2, "rank_2": 3, "rank_3": 2}) < 1e-4


def test_ring_whose_own_bond_is_the_largest() -> None:
    layer, weight = conv(16, 16)
    d = method("tensor_ring")
    ranks = {"rank_1": 4, "rank_2": 3, "rank_3": 2}
    weights = d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
    assert d.ranks_of(layer, weights) == ranks
    lost = float((weight - d.reconstruct(layer, weights)).square().sum() / weight.square().sum())
    assert 0 < lost < 1


def test_ring_survives_a_zero_weight() -> None:
    layer, weight = conv()
    d = method("tensor_ring")
    weights = d.stage_weights(layer, d.factorize(layer, weight * 0, Metric()), {"rank_1": 2, "rank_2": 2, "rank_3": 2})
    assert float(d.reconstruct(layer, weights).abs().max()) == 0


# cp


def terms(d: Decomposition, layer: LayerSpec, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The energies of the terms of a CP, and its reconstruction."""
    weights = d.stage_weights(layer, d.factorize(layer, weight, Metric()), {"rank": rank})
    norms = [weights[0][0].norm(dim=1), weights[1][0].flatten(1).norm(dim=1), weights[2][0].norm(dim=0)]
    return torch.stack(norms).prod(0).square(), d.reconstruct(layer, weights)


def test_cp_recovers_a_sum_of_terms() -> None:
    layer, weight = conv(12, 10)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (12, 10, 9)]
    planted = torch.einsum("or,ir,kr->oik", *factors).reshape(weight.shape)
    assert relative(method("cp"), layer, planted, {"rank": 4}) < 1e-4


def test_cp_stays_bounded_where_the_best_one_does_not_exist() -> None:
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3 and border rank 2: two ever larger terms come ever closer to it."""
    layer, _ = conv(6, 6, (6,))
    a, b = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q.T
    border = sum(torch.einsum("o,i,k->oik", *x) for x in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(border, Tensor)
    energies, dense = terms(method("cp"), layer, border[None], 2)
    assert float(energies.sum()) <= 10.1 * 3
    lost = float((border - dense[0]).square().sum()) / 3
    # The terms of rank one are orthogonal, so keeping two of the three loses a third.
    assert 0 < lost < 1 / 3
    energies, dense = terms(method("cp"), layer, border[None], 3)
    assert float((border - dense[0]).square().sum()) / 3 < 1e-3


def test_cp_is_never_worse_than_lost_says() -> None:
    layer, weight = conv(12, 10)
    d = method("cp")
    factors = d.factorize(layer, weight, Metric())
    for rank in (1, 5, 20):
        assert relative(d, layer, weight, {"rank": rank}) <= float(d.lost(factors, {"rank": rank})) + 1e-9


def test_cp_refuses_what_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight = conv()
    d = method("cp")
    factors = d.factorize(layer, weight, Metric())
    monkeypatch.setattr(cp_module, "_ENERGY", 1e-6)
    with pytest.raises(RefusedDecomposition, match="stem"):
        d.stage_weights(layer, factors, {"rank": 3})
    with pytest.raises(RefusedDecomposition, match="stem"):
        d.factorize(layer, weight * torch.nan, Metric())


@pytest.mark.parametrize("name", ["cp", "tensor_ring"])
def test_iterative_methods_repeat_themselves(name: str) -> None:
    layer, weight = conv()
    d = method(name)
    ranks = {n: min(b, 3) for n, b in d.rank_bounds(layer).items()}
    factors = d.factorize(layer, weight, Metric())
    first = d.stage_weights(layer, factors, ranks)
    torch.manual_seed(99)
    assert all(torch.equal(x, y) for x, y in zip(first, d.stage_weights(layer, factors, ranks), strict=True))


# all methods


@pytest.mark.parametrize("name", CHAINS)
def test_groups_are_independent(name: str) -> None:
    layer, weight = conv(12, 8, (3, 3), groups=2)
    single, _ = conv(6, 4)
    d = method(name)
    data = [calibration(4, seed=s) for s in (1, 2)]
    patch = torch.stack([x @ x.T / x.shape[1] for x in data])
    ranks = {n: max(1, b // 2) for n, b in d.rank_bounds(layer).items()}
    together = d.reconstruct(layer, d.stage_weights(layer, d.factorize(layer, weight, Metric(patch)), ranks))
    for g in range(2):
        factors = d.factorize(single, weight[g : g + 1], Metric(patch[g : g + 1]))
        alone = d.reconstruct(single, d.stage_weights(single, factors, ranks))
        torch.testing.assert_close(together[g], alone[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(table()))
def test_only_spatial_svd_fits_depthwise_layers(name: str) -> None:
    layer, _ = conv(6, 6, (3, 3), groups=6)
    assert (method(name).why_not(layer) is None) == name.startswith("spatial_svd")


@pytest.mark.parametrize("name", ["svd", "svd_in", "spatial_svd", "tucker2", "tensor_train", "tensor_ring", "cp"])
def test_polish_is_least_squares_on_the_data(name: str) -> None:
    """The last stage, fitted by LAPACK to the outputs that the rest of the built module gives on the very patches."""
    layer, weight = conv(8, 6)
    data = calibration(6, samples=2)
    metric = Metric(patch=(data @ data.T / data.shape[1])[None])
    d = method(name)
    weights = d.stage_weights(
        layer, d.factorize(layer, weight, metric), {n: max(1, b // 3) for n, b in d.rank_bounds(layer).items()}
    )
    before = float(metric.error(weight - d.reconstruct(layer, weights)))
    after = float(metric.error(weight - d.reconstruct(layer, d.polish(layer, weights, weight, metric))))

    # What the stages before the last make of one patch, as an image of one 3×3 position: linear in the patch.
    last: Any = d.build(layer, weights, None)[-1]
    patches = data.T.reshape(-1, 6, 3, 3)
    rest = d.build(layer, weights, None)[:-1]
    for conv_ in rest.modules():
        if isinstance(conv_, nn.Conv2d):
            conv_.padding = (0, 0)
    with torch.no_grad():
        seen = rest(patches).flatten(1)
    assert seen.shape[1] == last.weight[0].numel()
    target = (weight[0].flatten(1) @ data).T
    solution = torch.linalg.lstsq(seen, target, driver="gelsd").solution
    best = float((seen @ solution - target).square().sum()) / len(target)
    assert after == pytest.approx(best, rel=1e-5)
    assert after <= before


def test_polish_with_the_channel_moment_alone() -> None:
    layer, weight = conv(8, 6)
    data = calibration(6).reshape(6, -1)
    moment = data @ data.T / data.shape[1]
    d = method("tucker2")
    weights = d.stage_weights(layer, d.factorize(layer, weight, Metric()), {"rank_out": 3, "rank_in": 2})
    by_channel = d.polish(layer, weights, weight, Metric(channel=moment[None]))
    by_patch = d.polish(layer, weights, weight, Metric(patch=torch.kron(moment, torch.eye(9).double())[None]))
    torch.testing.assert_close(by_channel[-1], by_patch[-1])


@pytest.mark.parametrize("name", CHAINS)
def test_costs_of_a_huge_layer_do_not_overflow(name: str) -> None:
    layer = LayerSpec(
        "huge", "conv2d", 1 << 14, 1 << 14, (3, 3), (1, 1), (1, 1), (1, 1), calls=(Call(64, (512, 512), (512, 512)),)
    )
    d = method(name)
    full = d.rank_bounds(layer)
    half = {n: max(1, b // 2) for n, b in full.items()}
    if name == "tensor_ring":
        full["rank_1"], half["rank_1"] = 4, 2
    stacked = {n: np.array([full[n], half[n]], dtype=np.int32) for n in full}
    assert d.macs(layer, stacked).tolist() == [d.macs(layer, full), d.macs(layer, half)]
    assert d.params(layer, stacked).tolist() == [d.params(layer, full), d.params(layer, half)]
    assert d.macs(layer, half) > 1 << 32


def test_tensorly_is_imported_late_and_keeps_its_backend() -> None:
    code = "import sys, rankopt.decompositions as d; d.table(); sys.exit('tensorly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import tensorly as tl

    before, seen = tl.get_backend(), []
    layer, weight = conv()
    for d in map(method, CHAINS):
        ranks = {n: min(b, 2) for n, b in d.rank_bounds(layer).items()}
        d.stage_weights(layer, d.factorize(layer, weight, Metric()), ranks)
        assert tl.get_backend() == before
    thread = threading.Thread(target=lambda: seen.append(tl.get_backend()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(LayerError, match="tensor_ring"):
        method("tensor_rnig")
