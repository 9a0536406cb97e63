"""Contract tests for methods and targets, shipped for people who add one. Needs pytest, hypothesis, ultralytics-thop.

A whole test file for a method of your own::

    from rankopt.testing import DecompositionContract
    from mypackage import Butterfly


    class TestButterfly(DecompositionContract):
        method = Butterfly()   # or the name of a registered method

A target has its own: `TargetContract`; see `rankopt.target_contract`.

The contract, for every layer that `why_not` lets in and at any rank: the built module computes what the original class
holding `reconstruct(stage_weights)` computes, gradients included; an exact method at full rank gives back the original;
`params` and `macs` are what counters find in the built module; `skeleton` is the built module without its values.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankopt.contract_cases import EMBEDDINGS as EMBEDDINGS
from rankopt.contract_cases import GEOMETRIES as GEOMETRIES
from rankopt.contract_cases import LAYER_NAME as LAYER_NAME
from rankopt.contract_cases import MATRICES as MATRICES
from rankopt.contract_cases import Case as Case
from rankopt.contract_cases import Geometry as Geometry
from rankopt.contract_cases import correlated_metric as correlated_metric
from rankopt.contract_cases import geometries as geometries
from rankopt.contract_cases import prepare as prepare
from rankopt.contract_cases import specify as specify
from rankopt.decompositions import method as method_named
from rankopt.decompositions.chained import ChainDecomposition
from rankopt.decompositions.decomposition import Decomposition
from rankopt.errors import LayerError
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.target_contract import TargetContract as TargetContract


def dense_twin(case: Case, decomposition: Decomposition, weights: list[Tensor]) -> nn.Module:
    """The original class, holding the weight that the stage weights stand for."""
    twin, kind = copy.deepcopy(case.module), kind_named(case.layer)
    dense = decomposition.reconstruct(case.layer, weights).detach()
    state = kind.state(case.layer, dense, kind.bias(case.module))
    twin.load_state_dict({name: value.contiguous() for name, value in state.items()})
    return twin


def some_ranks(decomposition: Decomposition, layer: LayerSpec) -> list[dict[str, int]]:
    """All ones, full, halves, and each rank at one with the others full."""
    full = decomposition.rank_bounds(layer)
    ranks = [dict.fromkeys(full, 1), full, {n: (b + 1) // 2 for n, b in full.items()}]
    ranks += [{**full, name: 1} for name in full] if len(full) > 1 else []
    return [r for n, r in enumerate(ranks) if r not in ranks[:n]]


def counted_macs(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """MACs by thop and by torch's own counter; twice by torch's where a product is in no layer that thop knows."""
    import thop

    module = copy.deepcopy(module).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    by_torch = counter.get_total_flops() // 2
    if not isinstance(module, nn.Sequential):
        return by_torch, by_torch
    macs, _ = thop.profile(copy.deepcopy(module), inputs=(x,), verbose=False)
    return int(macs), by_torch


class DecompositionContract:
    """Subclass it with `method` set to a name or an instance; pytest collects the subclass if it is named Test….

    `geometries` are the layers that it is tried on.
    """

    method: str | Decomposition
    geometries: tuple[Geometry, ...] = (*GEOMETRIES, *EMBEDDINGS)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test with every geometry."""
        if "geometry" in metafunc.fixturenames:
            metafunc.parametrize("geometry", self.geometries, ids=lambda g: g.name)

    @property
    def decomposition(self) -> Decomposition:
        """The method under test."""
        return method_named(self.method) if isinstance(self.method, str) else self.method

    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            # torch says that an even kernel with padding "same" makes a copy.
            warnings.filterwarnings("ignore", message="Using padding='same'")
            yield

    def test_name_and_fit(self) -> None:
        """The method fits some of the geometries, and says on one line why not the others."""
        cases = [_case(self.decomposition, geometry) for geometry in self.geometries]
        reasons = [self.decomposition.why_not(case.layer) for case in cases]
        assert self.decomposition.name.isidentifier()
        assert None in reasons
        for case, reason in zip(cases, reasons, strict=True):
            if reason is not None:
                assert reason.strip()
                assert "\n" not in reason
                with pytest.raises(LayerError, match=LAYER_NAME):
                    self.decomposition.check(case.layer, {})

    def test_computes_what_the_dense_layer_computes(self, geometry: Geometry) -> None:
        """Outputs and input gradients, at several ranks; gradients reach every parameter."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        for ranks, weights in _solved(d, geometry):
            built = d.build(case.layer, weights, case.bias)
            _assert_same(built, dense_twin(case, d, weights), case.input, 1e-9)
            for name, parameter in built.named_parameters():
                assert parameter.grad is not None, f"{ranks}: no gradient reaches {name}"
                assert torch.isfinite(parameter.grad).all(), f"{ranks}: {name}"
                assert parameter.grad.abs().sum() > 0, f"{ranks}: the gradient of {name} is zero"

    def test_costs_are_what_counters_find(self, geometry: Geometry) -> None:
        """`params` and `macs` against the built module, thop and torch's FlopCounterMode; arrays of ranks too."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        solved = _solved(d, geometry)
        for ranks, weights in solved:
            built = d.build(case.layer, weights, case.bias).float()
            assert d.params(case.layer, ranks) == sum(p.numel() for p in built.parameters())
            by_thop, by_torch = counted_macs(built, _single(case.input))
            assert by_thop == by_torch
            assert d.macs(case.layer, ranks) == by_thop
        if solved:
            stacked = {n: np.array([r[n] for r, _ in solved], dtype=np.int32) for n in solved[0][0]}
            for cost in (d.params, d.macs):
                assert cost(case.layer, stacked).tolist() == [cost(case.layer, r) for r, _ in solved]

    @pytest.mark.parametrize("with_data", [False, True], ids=["plain", "whitened"])
    def test_full_rank_gives_back_the_original(self, geometry: Geometry, with_data: bool) -> None:
        """Only for methods that call themselves exact."""
        case, d = _case(self.decomposition, geometry, with_data), self.decomposition
        if case.factors is None or not d.exact:
            return
        full = d.rank_bounds(case.layer)
        weights = d.stage_weights(case.layer, case.factors, full)
        torch.testing.assert_close(d.reconstruct(case.layer, weights), case.weight, rtol=1e-6, atol=1e-6)
        built = d.build(case.layer, weights, case.bias)
        _assert_same(built, case.module, case.input, 1e-5)

    def test_ranks_and_skeleton(self, geometry: Geometry) -> None:
        """`ranks_of` undoes `stage_weights`; `stage_shapes` and `skeleton` match; the module owns its weights."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        for ranks, weights in _solved(d, geometry):
            d.check(case.layer, ranks)
            assert tuple(d.rank_bounds(case.layer)) == d.rank_names(case.layer)
            assert d.ranks_of(case.layer, weights) == ranks
            assert [tuple(w.shape) for w in weights] == d.stage_shapes(case.layer, ranks)
            built = d.build(case.layer, weights, case.bias)
            blank = d.skeleton(case.layer, ranks, torch.float64, "cpu")
            state = built.state_dict()
            assert {n: t.shape for n, t in blank.state_dict().items()} == {n: t.shape for n, t in state.items()}
            blank.load_state_dict(state)
            torch.testing.assert_close(blank(case.input), built(case.input), rtol=0, atol=0)
            before = [w.clone() for w in weights]
            with torch.no_grad():
                for parameter in built.parameters():
                    parameter.zero_()
            assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))

    def test_bad_ranks_are_refused(self, geometry: Geometry) -> None:
        """With the layer's name."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        if case.factors is None:
            return
        full: dict[str, Any] = d.rank_bounds(case.layer)
        first = next(iter(full))
        bad = [{**full, first: value} for value in (0, -1, full[first] + 1, 1.5, True, "1", None)]
        for ranks in [*bad, {}, {**full, "rank_x": 1}, {n: b for n, b in full.items() if n != first}]:
            with pytest.raises(LayerError, match=LAYER_NAME):
                d.check(case.layer, ranks)

    def test_lost_orders_ranks(self, geometry: Geometry) -> None:
        """Shares between 0 and 1 that never grow with a rank, the same for arrays; zero at full rank when exact."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        if case.factors is None:
            return
        full = d.rank_bounds(case.layer)
        for name, bound in full.items():
            grid = {n: np.full(bound, (b + 1) // 2) for n, b in full.items()} | {name: np.arange(1, bound + 1)}
            lost = d.lost(case.factors, grid)
            assert lost.shape == (bound,)
            assert (lost >= 0).all()
            assert (lost <= 1).all()
            assert (np.diff(lost) <= 1e-9).all()
            one = d.lost(case.factors, {n: int(v[-1]) for n, v in grid.items()})
            assert float(one) == pytest.approx(float(lost[-1]), abs=1e-12)
        if d.exact:
            assert float(d.lost(case.factors, full)) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("with_data", [False, True], ids=["plain", "whitened"])
    def test_polish_never_hurts(self, geometry: Geometry, with_data: bool) -> None:
        """The error falls or stays; of a chain only the last stage changes."""
        case, d = _case(self.decomposition, geometry, with_data), self.decomposition
        for ranks, weights in _solved(d, geometry, with_data):
            polished = d.polish(case.layer, weights, case.weight, case.metric)
            if isinstance(d, ChainDecomposition):
                assert all(torch.equal(a, b) for a, b in zip(weights[:-1], polished[:-1], strict=True))
            assert [p.shape for p in polished] == [w.shape for w in weights]
            before, after = (
                float(case.metric.error(case.weight - d.reconstruct(case.layer, w))) for w in (weights, polished)
            )
            assert after <= before * (1 + 1e-9), ranks

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
    def test_other_dtypes(self, geometry: Geometry, dtype: torch.dtype, tolerance: float) -> None:
        """Stage weights and bias in another dtype give a module of that dtype."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        for _, weights in _solved(d, geometry)[:2]:
            bias = None if case.bias is None else case.bias.to(dtype)
            built = d.build(case.layer, [w.to(dtype) for w in weights], bias)
            twin = dense_twin(case, d, weights)
            out = built(case.input.to(dtype) if case.input.is_floating_point() else case.input)
            assert out.dtype == dtype
            _assert_close(out.double(), twin(case.input), tolerance)

    def test_batches_and_memory_formats(self, geometry: Geometry) -> None:
        """Batches of 0 and 1, no batch at all and channels-last, wherever the original takes them."""
        case, d = _case(self.decomposition, geometry), self.decomposition
        x = case.input
        inputs = {"batch 0": x[:0], "batch 1": x[:1], "no batch": x[0]}
        if x.dim() in (4, 5):
            form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            inputs["channels last"] = x.contiguous(memory_format=form)
        for _, weights in _solved(d, geometry)[1:2]:
            built = d.build(case.layer, weights, case.bias)
            twin = dense_twin(case, d, weights)
            for name, given_input in inputs.items():
                try:
                    expected = twin(given_input)
                except (RuntimeError, ValueError):
                    continue
                out = built(given_input)
                assert out.shape == expected.shape, name
                if expected.numel():
                    _assert_close(out, expected, 1e-9)

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
    @given(data=st.data())
    def test_any_shape(self, data: st.DataObject) -> None:
        """The same for layers that hypothesis makes up."""
        d, geometry = self.decomposition, data.draw(geometries())
        case = prepare(d, geometry, with_data=data.draw(st.booleans()))
        if case.factors is None:
            return
        ranks = {n: data.draw(st.integers(1, b), label=n) for n, b in d.rank_bounds(case.layer).items()}
        weights = d.stage_weights(case.layer, case.factors, ranks)
        built = d.build(case.layer, weights, case.bias)
        _assert_same(built, dense_twin(case, d, weights), case.input, 1e-8)
        assert d.ranks_of(case.layer, weights) == ranks
        assert d.params(case.layer, ranks) == sum(p.numel() for p in built.parameters())
        assert (d.macs(case.layer, ranks),) * 2 == counted_macs(built.float(), _single(case.input))


@functools.lru_cache(maxsize=64)
def _case(decomposition: Decomposition, geometry: Geometry, with_data: bool = True) -> Case:
    return prepare(decomposition, geometry, with_data)


@functools.lru_cache(maxsize=64)
def _solved(
    decomposition: Decomposition, geometry: Geometry, with_data: bool = True
) -> list[tuple[dict[str, int], list[Tensor]]]:
    """Stage weights at several ranks; nothing where the method does not fit."""
    case = _case(decomposition, geometry, with_data)
    if case.factors is None:
        return []
    return [
        (ranks, decomposition.stage_weights(case.layer, case.factors, ranks))
        for ranks in some_ranks(decomposition, case.layer)
    ]


def _single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _assert_same(built: nn.Module, twin: nn.Module, x: Tensor, tolerance: float) -> None:
    """Equal outputs and equal gradients with respect to the input."""
    outs, grads = [], []
    for module in (built, twin):
        given_input = x.clone().requires_grad_(x.is_floating_point())
        out = module(given_input)
        toward = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).cos().reshape(out.shape)
        (out * toward).sum().backward()
        outs.append(out.detach())
        grads.append(given_input.grad)
    _assert_close(outs[0], outs[1], tolerance)
    if grads[0] is not None and grads[1] is not None:
        _assert_close(grads[0], grads[1], tolerance)
    assert all((grad is None) != x.is_floating_point() for grad in grads)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max().clamp_min(1e-3)) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance * scale)
