"""`patches`: the inputs of every output position of a layer, so that layer(x) is a matrix product with the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankopt.layer_spec import LayerSpec


def patches(layer: LayerSpec, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Unfold an input.

    Args:
        layer: a Linear, a convolution or a transposed convolution of any geometry, or linear maps side by side.
        x: its batched input: (n, ..., in) for Linear, (n, in, *size) for convolutions, (n, ..., groups, in/groups).
        positions: indices of the output positions that are wanted, flattened row by row; all when None.

    Returns:
        (n, positions, groups, in/groups·kernel); its product with ``group_weight(...).flatten(2)`` is the output.
    """
    if layer.dims == 0:
        flat = x.reshape(x.shape[0], -1, layer.groups, layer.in_channels // layer.groups)
        return flat if positions is None else flat[:, positions]
    windows = _windows(layer, x)
    n, d = x.shape[0], layer.dims
    out = windows.shape[2 : 2 + d]
    if positions is None:
        order = (0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        picked = windows.permute(order).reshape(n, math.prod(out), *windows.shape[1:2], *layer.kernel_size)
    else:
        index: tuple[Any, ...] = (slice(None), slice(None), *torch.unravel_index(positions, out))
        picked = windows[index].transpose(1, 2)
    return picked.reshape(n, -1, layer.groups, layer.in_channels // layer.groups * math.prod(layer.kernel_size))


def output_rows(layer: LayerSpec, y: Tensor, positions: Tensor | None = None) -> Tensor:
    """The output, or a gradient of its shape, as (n, positions, groups, out/groups), in the order of `patches`."""
    g = layer.groups
    if layer.dims == 0:
        rows = y.reshape(y.shape[0], -1, g, layer.out_channels // g)
    else:
        rows = y.flatten(2).transpose(1, 2).reshape(y.shape[0], -1, g, layer.out_channels // g)
    return rows if positions is None else rows[:, positions]


def _windows(layer: LayerSpec, x: Tensor) -> Tensor:
    """(n, in, *out, *kernel) as a view of the padded (and for transposed layers zero-stuffed) input."""
    strides = layer.stride
    if layer.transposed:
        x, strides = _stuffed(layer, x), (1,) * layer.dims
    else:
        x = _padded(layer, x)
    for d, k in enumerate(layer.kernel_size):
        x = x.unfold(2 + d, (k - 1) * layer.dilation[d] + 1, strides[d])[..., :: layer.dilation[d]]
    if layer.transposed:  # a transposed convolution is a convolution with the flipped kernel
        x = x.flip(tuple(range(2 + layer.dims, 2 + 2 * layer.dims)))
    return x


def _padded(layer: LayerSpec, x: Tensor) -> Tensor:
    sides: list[int] = []
    for d in reversed(range(layer.dims)):
        if isinstance(layer.padding, str):
            total = layer.dilation[d] * (layer.kernel_size[d] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [layer.padding[d], layer.padding[d]]
    if not any(sides):
        return x
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _stuffed(layer: LayerSpec, x: Tensor) -> Tensor:
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *size)
    index: tuple[Any, ...] = (..., *(slice(None, None, s) for s in layer.stride))
    stuffed[index] = x
    sides: list[int] = []
    for d in reversed(range(layer.dims)):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1)
        padding = int(layer.padding[d])
        sides += [reach - padding, reach - padding + layer.output_padding[d]]
    return F.pad(stuffed, sides)
