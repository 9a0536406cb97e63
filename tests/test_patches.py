"""`patches` against the modules themselves: its product with the weight is what the layer computes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankopt.by_sample import out_size
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.patches import output_rows, patches
from rankopt.testing import GEOMETRIES, Geometry, geometries, specify


def built(geometry: Geometry) -> tuple[Any, LayerSpec, Tensor]:
    torch.manual_seed(len(geometry.name))
    module: Any = geometry.make().double()
    x = torch.randn(geometry.shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        return module, specify(module, x), x


def own_rows(module: Any, layer: LayerSpec, x: Tensor) -> Tensor:
    """The oracle: what the module computes, less its bias, position by position."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        y = module(x)
    if layer.dims == 0:
        y = y if module.bias is None else y - module.bias
        return y.reshape(len(x), -1, 1, layer.out_channels)
    if module.bias is not None:
        y = y - module.bias.reshape(-1, *[1] * layer.dims)
    rows = torch.empty(len(x), math.prod(y.shape[2:]), layer.groups, layer.out_channels // layer.groups).double()
    for n in range(len(x)):
        for p, place in enumerate(
            torch.cartesian_prod(*[torch.arange(s) for s in y.shape[2:]]).reshape(-1, layer.dims)
        ):
            rows[n, p] = y[(n, slice(None), *place)].reshape(layer.groups, -1)
    return rows


def check(geometry: Geometry) -> None:
    module, layer, x = built(geometry)
    expected = own_rows(module, layer, x)
    weight = group_weight(layer, module.weight.detach()).flatten(2)
    found = torch.einsum("npgi,goi->npgo", patches(layer, x), weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    some = torch.arange(expected.shape[1])[::2].flip(0)
    torch.testing.assert_close(patches(layer, x, some), patches(layer, x)[:, some], rtol=0, atol=0)
    if layer.dims:
        assert math.prod(out_size(layer, x)) == expected.shape[1]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.name)
def test_product_with_the_weight_is_the_output(geometry: Geometry) -> None:
    check(geometry)


ODD = [
    ("transposed, dilated, output padding", lambda: nn.ConvTranspose2d(3, 4, (3, 2), 3, 1, (2, 1), 1, True, 2), 5),
    ("transposed, padded beyond its reach", lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, padding=2), 6),
    ("transposed, output padding beyond the stride", lambda: nn.ConvTranspose1d(2, 3, 3, 2, 0, 3, dilation=4), 4),
    ("kernel as large as the input", lambda: nn.Conv2d(3, 4, 5), 5),
    ("circular, wide", lambda: nn.Conv1d(3, 4, 5, padding=4, padding_mode="circular"), 5),
    ("reflect, three dimensions", lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="reflect"), 4),
    ("same, dilated, circular, even", lambda: nn.Conv2d(4, 4, 4, 1, "same", 2, 2, True, "circular"), 8),
    ("stride beyond the kernel", lambda: nn.Conv2d(3, 4, 2, stride=3), 7),
]


@pytest.mark.parametrize(("name", "make", "size"), ODD, ids=[o[0] for o in ODD])
def test_odd_geometries(name: str, make: Any, size: int) -> None:
    module = make()
    if "output padding" in name and isinstance(module, nn.ConvTranspose2d):
        module = nn.ConvTranspose2d(4, 6, (3, 2), 3, 1, (2, 1), 2, True, 2)
    dims = len(module.kernel_size)
    check(Geometry(name, lambda: module, (2, module.in_channels, *range(size, size + dims))))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(geometry=geometries())
def test_any_geometry(geometry: Geometry) -> None:
    check(geometry)


@settings(max_examples=20, derandomize=True)
@given(middle=st.lists(st.integers(1, 3), max_size=3))
def test_linear_with_any_number_of_dimensions(middle: list[int]) -> None:
    check(Geometry("linear", lambda: nn.Linear(4, 3), (2, *middle, 4)))


@pytest.mark.parametrize("geometry", GEOMETRIES[::3], ids=lambda g: g.name)
def test_output_rows_are_in_the_order_of_patches(geometry: Geometry) -> None:
    module, layer, x = built(geometry)
    expected = own_rows(module, layer, x)
    bias = 0 if module.bias is None else module.bias.detach().reshape(layer.groups, -1)
    with torch.no_grad():
        found = output_rows(layer, module(x)) - bias
        some = torch.tensor([expected.shape[1] - 1, 0])
        torch.testing.assert_close(output_rows(layer, module(x), some) - bias, expected[:, some])
    torch.testing.assert_close(found, expected)


def test_channels_last_and_other_dtypes() -> None:
    module = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 6)
    layer = specify(module, x)
    expected = patches(layer, x)
    assert torch.equal(patches(layer, x.contiguous(memory_format=torch.channels_last)), expected)
    assert patches(layer, x.bfloat16()).dtype == torch.bfloat16
