"""Weight gradients against autograd, and predicted losses against the divergence that tiny changes cause."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankopt import fisher
from rankopt.batches import as_batches
from rankopt.calibration import CalibrationOptions, calibrate
from rankopt.divergence import Divergence
from rankopt.fisher import FisherSamples, weight_gradients
from rankopt.layer_spec import LayerSpec, group_weight, ungroup_weight
from rankopt.layers import find_layers
from rankopt.testing import GEOMETRIES, Geometry, geometries, specify


def by_autograd(module: Any, layer: LayerSpec, x: Tensor, gradient: Tensor) -> Tensor:
    """The oracle: (draws, n, entries), one backward pass a sample and draw."""
    out = torch.empty(*gradient.shape[:2], module.weight.numel(), dtype=torch.float64)
    for n in range(len(x)):
        for d in range(len(gradient)):
            (grad,) = torch.autograd.grad((module(x[n : n + 1]) * gradient[d, n]).sum(), module.weight)
            out[d, n] = group_weight(layer, grad).flatten()
    return out


def check(geometry: Geometry) -> None:
    torch.manual_seed(0)
    module: Any = geometry.make().double()
    x = torch.randn(geometry.shape).double()
    layer = specify(module, x)
    gradient = torch.randn(2, *module(x).shape).double()
    expected = by_autograd(module, layer, x, gradient)
    found = weight_gradients(layer, x, gradient).flatten(2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * max(1, float(expected.abs().max())))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_weight_gradients(geometry: Geometry) -> None:
    check(geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(geometry=geometries())
def test_weight_gradients_of_any_layer(geometry: Geometry) -> None:
    check(geometry)


def test_several_frames_of_a_sample_add_up() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    x, gradient = torch.randn(3, 5, 4, 7, 6), torch.randn(2, 3, 5, 6, 3, 2)
    layer = specify(module, x[0])
    by_frame = [weight_gradients(layer, x[:, f], gradient[:, :, f]) for f in range(5)]
    torch.testing.assert_close(weight_gradients(layer, x, gradient), torch.stack(by_frame).sum(0), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, derandomize=True)
@given(samples=st.integers(1, 6), draws=st.integers(1, 3), changes=st.integers(1, 4), room=st.sampled_from([1, 400]))
def test_pairs_say_what_gradients_say(samples: int, draws: int, changes: int, room: int) -> None:
    torch.manual_seed(samples)
    module = nn.Conv1d(4, 6, 3, groups=2)
    x, g = torch.randn(samples, 4, 9), torch.randn(draws, samples, 6, 7)
    layer = specify(module, x)
    whole = FisherSamples(layer, weight_gradients(layer, x, g).flatten(2).flatten(0, 1))
    halves = FisherSamples(
        layer, None, [(x[: samples // 2], g[:, : samples // 2]), (x[samples // 2 :], g[:, samples // 2 :])]
    )
    halves = FisherSamples(layer, None, [(a, b) for a, b in halves.pairs if len(a)])
    change = torch.randn(changes, *layer.group_shape).double()
    before = fisher._CHUNK_BYTES
    fisher._CHUNK_BYTES = room  # type: ignore[misc]
    try:
        assert len(whole) == len(halves) == samples * draws
        torch.testing.assert_close(halves.losses(change), whole.losses(change), rtol=1e-4, atol=1e-6)
        ordered = [t.scores(change).sort(1).values for t in (whole, halves)]
        torch.testing.assert_close(ordered[1], ordered[0], rtol=1e-4, atol=1e-5)
    finally:
        fisher._CHUNK_BYTES = before  # type: ignore[misc]


def test_no_samples_predict_nothing() -> None:
    layer = specify(nn.Linear(3, 2), torch.randn(1, 3))
    empty = FisherSamples(layer)
    assert len(empty) == 0
    assert empty.losses(torch.randn(4, 1, 2, 3)).tolist() == [0.0] * 4
    assert empty.scores(torch.randn(4, 1, 2, 3)).shape == (4, 0)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    ).eval()


X = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(5))


def measured(model: nn.Module, name: str, layer: LayerSpec, change: Tensor, x: Tensor) -> float:
    """The mean divergence that the change really causes, in double precision."""
    dense = copy.deepcopy(model).double()
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.get_submodule(name).weight += ungroup_weight(layer, change.double())  # type: ignore[operator]
        p, q = dense(x.double()).log_softmax(1), changed(x.double()).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("name", ["0", "2", "5"])
def test_exact_fisher_is_the_divergence_of_tiny_changes(name: str) -> None:
    model = net()
    layer = {la.name: la for la in find_layers(model, X[:1])}[name]
    module = model.get_submodule(name)
    kept: dict[str, Tensor] = {}
    handle = module.register_forward_hook(lambda m, a, out: kept.update(x=a[0], out=out))
    log_p = model(X).log_softmax(1)
    handle.remove()
    # every label once, weighted so that the mean over labels is the mean over the model's own distribution
    classes = log_p.shape[1]
    gradients = []
    for y in range(classes):
        (g,) = torch.autograd.grad(log_p[:, y].sum(), kept["out"], retain_graph=True)
        weight = (log_p[:, y].exp() * classes).sqrt().detach()
        gradients.append(g * weight.reshape(-1, *[1] * (g.dim() - 1)))
    samples = FisherSamples(layer, None, [(kept["x"].detach(), torch.stack(gradients))])
    torch.manual_seed(1)
    changes = torch.randn(5, *layer.group_shape) * 1e-3
    expected = torch.tensor([measured(model, name, layer, c, X) for c in changes])
    torch.testing.assert_close(samples.losses(changes), expected, rtol=0.02, atol=0)


def test_drawn_labels_come_close_to_it() -> None:
    model = net()
    layers = find_layers(model, X[:1])
    options = CalibrationOptions(draws=300, temperature=1.0, piece=5)
    found = calibrate(model, layers, as_batches(X), Divergence(), options)
    torch.manual_seed(2)
    for layer in layers:
        changes = torch.randn(4, *layer.group_shape) * 1e-3
        expected = torch.tensor([measured(model, layer.name, layer, c, X) for c in changes])
        torch.testing.assert_close(found[layer.name].fisher.losses(changes), expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4)])
def test_regression_agrees_too(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[-1], 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    x = torch.randn(shape)
    divergence = Divergence.of(model(x).detach(), "regression")
    layers = find_layers(model, x[:1])
    found = calibrate(model, layers, as_batches(x), divergence, CalibrationOptions(draws=400))
    for layer in layers:
        change = torch.randn(1, *layer.group_shape) * 1e-3
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_submodule(layer.name).weight += change[0, 0]  # type: ignore[operator]
            expected = divergence.between(model(x).double(), changed(x).double()).mean()
        torch.testing.assert_close(found[layer.name].fisher.losses(change)[0], expected, rtol=0.2, atol=0)
