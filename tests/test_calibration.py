"""Calibration against direct computation, on models of every shape, and that it leaves no trace."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankopt.batches import Batch, as_batches
from rankopt.calibration import CalibrationOptions, LayerStatistics, calibrate, pieces
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.layers import find_layers
from rankopt.testing import GEOMETRIES, Geometry

ALL = CalibrationOptions(max_rows=None, temperature=1.0)


def run(
    model: nn.Module, batches: Sequence[Batch], options: CalibrationOptions = ALL, names: Sequence[str] | None = None
) -> tuple[list[LayerSpec], dict[str, LayerStatistics]]:
    first = batches[0].take(slice(0, 1))
    found = find_layers(model, first.args, first.kwargs)
    layers = [la for la in found if la.skip is None and la.kind != "attention"]  # its calls are gathered, no moments
    layers = [la for la in layers if names is None or la.name in names]
    with torch.no_grad():
        divergence = Divergence.of(model.eval()(*first.args, **first.kwargs))
    return layers, calibrate(model, layers, batches, divergence, options)


def moment_by_columns(model: nn.Module, layer: LayerSpec, batches: Sequence[Batch]) -> Tensor:
    """The oracle: patches from running the layer on one-hot weights, one column of the patch at a time."""
    module: Any = model.get_submodule(layer.name)
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, a, k: kept.append(a[0] if a else k["input"]), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    handle.remove()
    g, o, i, *k = layer.group_shape
    size = i * math.prod(k)
    columns = []
    before, bias = module.weight.data.clone(), module.bias
    module.bias = None
    with torch.no_grad():
        for c in range(size):
            one = torch.zeros(g, o, size, dtype=before.dtype)
            one[:, 0, c] = 1
            w = one.reshape(layer.group_shape)
            w = w.transpose(1, 2) if layer.transposed else w
            module.weight.data = w.reshape(layer.weight_shape).contiguous()
            outs = [module(x) for x in kept]
            flat = [(y.movedim(1, -1) if layer.dims else y).reshape(-1, g, o)[:, :, 0] for y in outs]
            columns.append(torch.cat(flat))
    module.weight.data, module.bias = before, bias
    rows = torch.stack(columns, -1).double()  # position, group, column
    return torch.einsum("pgi,pgj->gij", rows, rows) / len(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_moments_are_those_of_all_patches(geometry: Geometry) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(geometry.make(), nn.Flatten())
    batches = as_batches(torch.randn(7, *geometry.shape[1:]), batch_size=5)
    (layer,), found = run(model, batches, replace(ALL, piece=3))
    metric = found["0"].metric
    expected = moment_by_columns(model, layer, batches)
    assert metric.patch is not None
    torch.testing.assert_close(metric.patch.double(), expected, rtol=1e-5, atol=1e-5)
    assert metric.channel is None


def test_large_patches_keep_the_channels_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2, padding=1), nn.Flatten())
    x = torch.randn(5, 6, 4, 4)
    _, found = run(model, as_batches(x), replace(ALL, max_patch=26))
    rows = x.movedim(1, -1).reshape(-1, 2, 3)
    expected = torch.einsum("pgi,pgj->gij", rows, rows) / len(rows)
    assert found["0"].metric.patch is None
    torch.testing.assert_close(found["0"].metric.channel, expected.double(), rtol=1e-5, atol=1e-6)


def test_a_share_of_the_positions_comes_close() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    batches = as_batches(torch.randn(200, 2, 12, 12))
    _, full = run(model, batches)
    _, part = run(model, batches, replace(ALL, max_rows=4000))
    for name in ("0", "2"):
        a, b = full[name].metric.patch, part[name].metric.patch
        assert a is not None
        assert b is not None
        assert 0 < float((a - b).norm() / a.norm()) < 0.1


def test_gradient_moments_and_their_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.randn(9, 3, 4, 4)
    (conv, linear), found = run(model, as_batches(x), replace(ALL, draws=400))
    p = model(x).softmax(1).detach()
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)  # of softmax, for the last layer
    assert found["3"].metric.gradient is not None
    torch.testing.assert_close(found["3"].metric.gradient[0].float(), exact, rtol=0.2, atol=0.01)
    assert (len(found["0"].fisher), len(found["3"].fisher)) == (9 * 400, 9 * 400)
    assert found["0"].metric.gradient.shape == (1, 4, 4)  # type: ignore[union-attr]
    assert (conv.name, linear.name) == ("0", "3")


# models of every shape -----------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer twice, an in-place activation behind it, a residual that reads its output again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.fc(x))
        return self.out(torch.nn.functional.relu(self.fc(h) + h, inplace=True))


class Encoder(nn.Module):
    """Sequence first inside, samples first outside; attention whose children are protected."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.batch_first else x.transpose(0, 1)
        h = self.encoder(h)
        return self.head((h if self.batch_first else h.transpose(0, 1)).mean(1))


class Frames(nn.Module):
    """Images of a video as one batch, and tokens of it in one flat list of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        h = torch.relu(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.fc(h).reshape(n, t, -1).mean(1)


class Table(nn.Module):
    """A layer that sees no samples at all, only a table of positions; and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("positions", torch.randn(10, 4))

    def forward(self, *, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(input=torch.tanh(x * scale[:, None] + self.table(self.positions).mean(0)))}


class Alone(nn.Module):
    """Samples one by one, without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.stack([torch.tanh(self.conv(one)).mean((1, 2)) for one in x]))


MODELS: dict[str, tuple[Any, Any]] = {
    "shared and in place": (Shared, lambda n: (torch.randn(n, 6), None)),
    "sequence first": (Encoder, lambda n: (torch.randn(n, 5, 8), None)),
    "batch first": (lambda: Encoder(True), lambda n: (torch.randn(n, 5, 8), None)),
    "frames": (Frames, lambda n: (torch.randn(n, 3, 2, 5, 5), None)),
    "table, keywords, dict": (Table, lambda n: {"x": torch.randn(n, 6), "scale": torch.rand(n)}),
    "alone": (Alone, lambda n: (torch.randn(n, 2, 5, 5), None)),
}


def loss_by_brute_force(model: nn.Module, layer: LayerSpec, batches: Sequence[Batch], change: Tensor) -> float:
    """Half the mean of ⟨∂ log p(y) / ∂W, change⟩² over samples and the model's own distribution, exactly."""
    weight: Any = model.get_submodule(layer.name).weight
    total, samples = 0.0, 0
    for batch in batches:
        for n in range(len(batch)):
            one = batch.take(slice(n, n + 1))
            log_p = pick(model(*one.args, **one.kwargs)).log_softmax(-1)[0]
            for y in range(len(log_p)):
                (g,) = torch.autograd.grad(log_p[y], weight, retain_graph=True)
                total += float(log_p[y].detach().exp() * (group_weight(layer, g) * change).sum() ** 2)
            samples += 1
    return total / samples / 2


@pytest.mark.parametrize("piece", [1, 5, 32])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_losses(name: str, piece: int) -> None:
    """Five samples of five tokens too, where samples and tokens can't be told apart by their number."""
    make, source = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    batches = as_batches(source(15) if name.startswith("table") else [source(9), source(6)])
    layers, found = run(model, batches, replace(ALL, draws=150, piece=piece))
    assert layers
    for layer in layers:
        change = torch.randn(layer.group_shape, generator=torch.Generator().manual_seed(1)) * 0.1
        expected = loss_by_brute_force(model, layer, batches, change)
        assert float(found[layer.name].fisher.losses(change[None])) == pytest.approx(expected, rel=0.2), layer.name


def test_attention_is_left_out_and_its_neighbours_are_not() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    batches = as_batches(torch.randn(6, 5, 8))
    layers, found = run(model, batches)
    assert [la.name for la in layers] == ["encoder.layers.0.linear1", "encoder.layers.0.linear2", "head"]
    for layer in layers:
        if layer.name != "head":
            torch.testing.assert_close(
                found[layer.name].metric.patch, moment_by_columns(model, layer, batches), rtol=1e-4, atol=1e-4
            )


class Heads(nn.Module):
    """The judged output sees `a` and `b`, not `aux`; `frozen` runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a, self.b, self.aux = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x = self.frozen(x)
        h = torch.relu(self.a(x))
        return self.b(h), self.aux(h)


def test_layers_that_no_gradient_reaches_have_moments_and_no_samples() -> None:
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(40, 6)
    _, found = run(model, as_batches(x))
    assert {n: len(s.fisher) for n, s in found.items()} == {"frozen": 0, "a": 160, "b": 160, "aux": 0}
    assert all(s.metric.patch is not None for s in found.values())


# limits on what is gathered ------------------------------------------------------------------------------------------


@settings(max_examples=25, derandomize=True)
@given(samples=st.integers(1, 20), size=st.integers(1, 9))
def test_pieces_are_the_batch(samples: int, size: int) -> None:
    batch = Batch((torch.arange(samples).reshape(-1, 1),), {"k": torch.arange(samples)}, None)
    cut = list(pieces(batch, size))
    assert all(1 <= len(p) <= size for p in cut)
    assert torch.cat([p.args[0] for p in cut]).flatten().tolist() == list(range(samples))
    assert torch.cat([p.kwargs["k"] for p in cut]).tolist() == list(range(samples))


def test_the_size_of_pieces_changes_nothing_but_the_draws() -> None:
    torch.manual_seed(0)
    model = Shared()
    batches = as_batches(torch.randn(20, 6), batch_size=8)
    results = [run(model, batches, replace(ALL, piece=p))[1] for p in (1, 3, 32)]
    for other in results[1:]:
        for name in ("fc", "out"):
            torch.testing.assert_close(other[name].metric.patch, results[0][name].metric.patch)
            assert len(other[name].fisher) == 20 * 4


def test_memory_of_the_gradients_is_bounded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3))
    batches = as_batches(torch.randn(100, 50))
    for room in (1, 20_000, 2**30):
        _, found = run(model, batches, replace(ALL, layer_bytes=room, piece=10))
        for name in ("0", "2"):
            held = found[name].fisher
            tensors = [*([held.gradients] if held.gradients is not None else []), *(t for p in held.pairs for t in p)]
            one = (50 + 4 * 40) * 4 if name == "0" else 4 * 40 * 3 * 4
            assert 4 <= len(held) <= 400
            assert sum(t.numel() * 4 for t in tensors) <= max(room, one)
            assert torch.isfinite(held.losses(torch.randn(2, *held.layer.group_shape))).all()
    _, found = run(model, batches, replace(ALL, fisher_samples=20, piece=10))
    assert len(found["0"].fisher) == 80
    _, found = run(model, batches, replace(ALL, fisher_samples=0))
    assert len(found["0"].fisher) == 0


def test_repeatable() -> None:
    torch.manual_seed(0)
    model, batches = Encoder(), as_batches(torch.randn(6, 5, 8))
    change = torch.randn(1, 1, 3, 8)
    first, again = (run(model, batches, replace(ALL, seed=3, max_rows=10))[1]["head"] for _ in range(2))
    assert torch.equal(first.metric.patch, again.metric.patch)  # type: ignore[arg-type]
    assert torch.equal(first.fisher.losses(change), again.fisher.losses(change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3))
    _, found = run(model.to(dtype), as_batches(torch.randn(12, 2, 4, 4).to(dtype)))
    for statistics in found.values():
        assert torch.isfinite(statistics.metric.patch).all()  # type: ignore[arg-type]
        assert torch.isfinite(statistics.fisher.losses(torch.randn(1, *statistics.fisher.layer.group_shape))).all()


# no trace is left ----------------------------------------------------------------------------------------------------


def traced(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"mode": {n: m.training for n, m in model.named_modules()}}
    state["wants"] = {n: p.requires_grad for n, p in model.named_parameters()}
    state["hooks"] = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    state["grad"] = {n: p.grad for n, p in model.named_parameters()}
    state["values"] = {n: t.clone() for n, t in model.state_dict().items()}
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("mode", "wants", "hooks", "grad"):
        assert before[key] == after[key], key
    assert all(torch.equal(v, after["values"][n]) for n, v in before["values"].items())


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(16, 3)
        self.fault: str = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(self.drop(torch.relu_(self.bn(self.conv(x)))).flatten(1))
        if self.fault == "raises":
            raise ZeroDivisionError("in the model\nsecond line")
        return h * float("nan") if self.fault == "nan" else h


@pytest.mark.parametrize("fault", ["", "raises", "nan"])
def test_the_model_is_left_as_it_was(fault: str) -> None:
    torch.manual_seed(0)
    model = Faulty()
    model.train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    model.fc.register_forward_hook(lambda m, a, o: None)
    batches = as_batches(torch.randn(8, 2, 4, 4))
    layers = find_layers(model, batches[0].args)
    divergence = Divergence()
    model.fault = fault
    before, grad_mode = traced(model), torch.is_grad_enabled()
    if fault:
        with pytest.raises(DataError) as caught:
            calibrate(model, layers, batches, divergence)
        assert ("NaN or infinity" if fault == "nan" else "ZeroDivisionError: in the model") in caught.value.message
        assert "second line" not in caught.value.message
    else:
        calibrate(model, layers, batches, divergence)
    assert_same(before, traced(model))
    assert torch.is_grad_enabled() == grad_mode


def test_parameters_never_get_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Faulty()
    seen: list[Any] = []
    original = Divergence.score

    def watched(self: Divergence, output: Tensor, *args: Any) -> Tensor:
        seen.extend(p.grad for p in model.parameters())
        assert not any(p.requires_grad for p in model.parameters())
        return original(self, output, *args)

    monkeypatch.setattr(Divergence, "score", watched)
    run(model, as_batches(torch.randn(8, 2, 4, 4)))
    assert seen
    assert all(g is None for g in seen)
    assert all(p.grad is None for p in model.parameters())


def test_graphs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a piece is judged, no graph of an earlier one is alive."""
    torch.manual_seed(0)
    graphs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    original = Divergence.score

    def watched(self: Divergence, output: Tensor, *args: Any) -> Tensor:
        alive.append(sum(g() is not None for g in graphs if g() is not output))
        graphs.append(weakref.ref(output))
        return original(self, output, *args)

    monkeypatch.setattr(Divergence, "score", watched)
    run(Faulty(), as_batches(torch.randn(40, 2, 4, 4)), replace(ALL, piece=4))
    gc.collect()
    assert len(alive) == 40
    assert max(alive) == 0
    assert not any(g() is not None for g in graphs)


def test_no_layers_and_no_gradient_options() -> None:
    model, batches = Faulty(), as_batches(torch.randn(4, 2, 4, 4))
    assert calibrate(model, [], batches, Divergence()) == {}


def test_under_no_grad_of_the_caller() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        _, found = run(Faulty(), as_batches(torch.randn(4, 2, 4, 4)))
    assert len(found["conv"].fisher) == 16


def test_data_of_another_shape() -> None:
    model = Faulty()
    layers = find_layers(model, torch.randn(1, 2, 4, 4))
    with pytest.raises(DataError, match=r"^calibration data: Faulty does not run on it: RuntimeError"):
        calibrate(model, layers, as_batches([torch.randn(4, 2, 4, 4), torch.randn(4, 2, 6, 6)]), Divergence())
