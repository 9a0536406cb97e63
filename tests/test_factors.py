"""The factor cache: one factorization a layer and method, right slices from memory and from disk, exact closed forms.

The closed form (`svd`, the layer's inputs whitened) is checked on the built module: its output error on the
calibration data is the sum of the eigenvalues of the output's second moment that it gives up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt.batches import as_batches
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.divergence import Divergence
from rankopt.errors import LayerError
from rankopt.factors import Factors
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.layers import find_layers
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import apply
from rankopt.testing import correlated_metric


def data(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose channels are strongly correlated, and neighbouring positions too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    dim = 1 if len(shape) > 2 else -1
    mix = torch.randn(shape[dim], shape[dim], generator=generator) * torch.arange(1, shape[dim] + 1) ** -0.7
    x = torch.einsum("...c,cd->...d", x.movedim(dim, -1), mix).movedim(-1, dim)
    for d in range(2, len(shape)):
        x = x + 0.7 * x.roll(1, d)
    return x.relu() + 0.1 * x


CLOSED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9), (80, 12)),
    "linear, no bias": (lambda: nn.Linear(12, 9, bias=False), (80, 12)),
    "wide linear": (lambda: nn.Linear(6, 20), (80, 6)),
    "conv 3×3": (lambda: nn.Conv2d(5, 12, 3, padding=1), (20, 5, 8, 8)),
    "conv, reflect, stride, dilation": (
        lambda: nn.Conv2d(5, 12, 3, (2, 1), 2, 2, padding_mode="reflect"),
        (20, 5, 9, 8),
    ),
    "conv 1×1": (lambda: nn.Conv2d(10, 12, 1), (20, 10, 6, 6)),
    "conv, groups": (lambda: nn.Conv2d(6, 12, 3, groups=3), (20, 6, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 12, 4, padding="same"), (30, 6, 16)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2), (12, 3, 5, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, 1), (20, 6, 6, 5)),
    "transposed, groups": (lambda: nn.ConvTranspose1d(8, 12, 4, 3, groups=2), (20, 8, 9)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", CLOSED)
def test_the_output_error_on_the_data_is_the_optimum(name: str, rank: int) -> None:
    make, shape = CLOSED[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).eval(), data(*shape)
    (layer,) = find_layers(model, x[:1])
    batches = as_batches(x, batch_size=7)
    options = CalibrationOptions(max_rows=None, piece=4)
    metric = calibrate(model, [layer], batches, Divergence("regression"), options)["0"].metric
    plan = Plan({"0": LayerChoice("svd", {"rank": rank})})
    with torch.no_grad():
        y = model(x).double()
        bias = 0 if not layer.bias else model[0].bias.detach().double().reshape(-1, *[1] * layer.dims)  # type: ignore[union-attr, operator]
        centred = (y - bias).movedim(1, -1) if layer.dims else y - bias
        rows = centred.reshape(-1, layer.groups, layer.out_channels // layer.groups)
        optimum = sum(float(torch.linalg.svdvals(rows[:, g])[rank:].square().sum()) for g in range(layer.groups))

        def error(module: nn.Module) -> float:
            return float((module(x).double() - y).square().sum())

        whitened = error(apply(model, plan, Factors(model, {"0": metric})))
        from_weights = error(apply(model, plan, Factors(model)))
    assert whitened == pytest.approx(optimum, rel=1e-4, abs=1e-6 * float(y.square().sum()))
    assert whitened <= from_weights * (1 + 1e-6)
    if layer.groups == 1:
        assert whitened < 0.98 * from_weights


def setup(kind: Any = None) -> tuple[nn.Sequential, LayerSpec, Metric]:
    torch.manual_seed(1)
    model = nn.Sequential(kind or nn.Conv2d(6, 8, 3, padding=1)).eval()
    (layer,) = find_layers(model, torch.randn(1, 6, 6, 6))
    return model, layer, correlated_metric(layer)


def test_a_method_factorizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, metric = setup()
    calls: list[str] = []
    way = type(method("tucker2"))
    original = way.factorize
    monkeypatch.setattr(way, "factorize", lambda self, *a: calls.append("x") or original(self, *a))
    for bound in (2**30, 0):  # also where every other entry goes to disk in between
        calls.clear()
        factors = Factors(model, {"0": metric}, max_bytes=bound)
        for rank in (1, 4, 8):
            factors(layer, LayerChoice("tucker2", {"rank_out": rank, "rank_in": 2}))
            factors(layer, LayerChoice("svd", {"rank": rank}))
        assert calls == ["x"]


@pytest.mark.parametrize("name", ["cp", "tensor_ring"])
def test_what_can_not_be_sliced_is_kept_per_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, metric = setup()
    way = method(name)
    solved: list[dict[str, int]] = []
    original = type(way).stage_weights
    monkeypatch.setattr(
        type(way),
        "stage_weights",
        lambda self, la, f, ranks: solved.append(dict(ranks)) or original(self, la, f, ranks),
    )
    factors = Factors(model, {"0": metric}, max_bytes=0)
    ranks = [dict.fromkeys(way.rank_names(layer), r) for r in (1, 2)]
    first = [factors(layer, LayerChoice(name, r)) for r in ranks]
    again = [factors(layer, LayerChoice(name, r)) for r in ranks]
    assert solved == ranks
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["svd", "svd_in", "spatial_svd", "tucker2", "tucker", "tensor_train"])
@pytest.mark.parametrize("polish", [False, True])
def test_slices_equal_a_direct_factorization(name: str, polish: bool) -> None:
    model, layer, metric = setup()
    way = method(name)
    ranks = {n: max(1, b // 2) for n, b in way.rank_bounds(layer).items()}
    weight = group_weight(layer, model[0].weight.detach().double())  # type: ignore[union-attr, operator, arg-type]
    direct = way.stage_weights(layer, way.factorize(layer, weight, metric.without_gradient()), ranks)
    if polish:
        direct = way.polish(layer, direct, weight, metric)
    for bound in (0, 2**30):
        found = Factors(model, {"0": metric}, max_bytes=bound, polish=polish)(layer, LayerChoice(name, ranks))
        torch.testing.assert_close(way.reconstruct(layer, found), way.reconstruct(layer, direct))


def test_polish_lowers_the_error_and_gradients_change_it() -> None:
    model, layer, metric = setup()

    def error(name: str, **options: Any) -> float:
        factors, choice, way = Factors(model, {"0": metric}, **options), LayerChoice(name, {"rank": 2}), method(name)
        return float(metric.error(factors.weight(layer) - way.reconstruct(layer, factors(layer, choice))))

    assert error("svd_in") < error("svd_in", polish=False)
    assert error("svd") < error("svd", polish=False, gradient=True)  # svd without gradients is the optimum
    assert Factors(model, {"0": metric}).metric("0").gradient is None
    assert Factors(model, {"0": metric}, gradient=True).metric("0").gradient is not None
    assert not Factors(model).metric("0").known
    assert Factors(model, lambda name: metric).metric("0").known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, layer, metric = setup()
    model.to(dtype)
    factors = Factors(model, {"0": metric})
    assert factors.weight(layer).dtype == torch.float64
    built = apply(model, Plan({"0": LayerChoice("svd", {"rank": 8})}), factors)
    assert next(built.parameters()).dtype == dtype
    x = torch.randn(2, 6, 6, 6).to(dtype)
    torch.testing.assert_close(built(x), model(x), rtol=0.05, atol=0.05)


def test_nan_weights_are_named() -> None:
    model, layer, _ = setup()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(LayerError, match=r"^0: its weight holds NaN"):
        Factors(model)(layer, LayerChoice("svd", {"rank": 2}))
