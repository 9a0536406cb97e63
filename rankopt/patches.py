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
    if positions is not None and not layer.transposed and layer.padding_mode == "zeros":
        return _gathered(layer, x, positions)
    if positions is None and layer.dims == 2 and not layer.transposed:  # the same, several times faster
        columns = F.unfold(_padded(layer, x), layer.kernel_size, layer.dilation, 0, layer.stride)
        return columns.unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2)
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


def _gathered(layer: LayerSpec, x: Tensor, positions: Tensor) -> Tensor:
    """The same for some positions of a convolution, without a padded copy of the whole input."""
    before = [low for low, _ in _sides(layer)]
    index = torch.zeros(len(positions), 1, dtype=torch.long)
    inside = torch.ones(len(positions), 1, dtype=torch.bool)
    for d, (at, size) in enumerate(zip(torch.unravel_index(positions, _out_size(layer, x)), x.shape[2:], strict=True)):
        taps = torch.arange(layer.kernel_size[d]) * layer.dilation[d] - before[d]
        place = at.to(taps)[:, None] * layer.stride[d] + taps  # (positions, taps) along this dimension
        kept = (place >= 0) & (place < size)
        index = (index[:, :, None] * size + place.clamp(0, size - 1)[:, None]).flatten(1)
        inside = (inside[:, :, None] & kept[:, None]).flatten(1)
    flat = x.flatten(2) if x.is_contiguous() else x.movedim(1, -1).flatten(1, -2).transpose(1, 2)
    picked = flat[:, :, index.flatten().to(x.device)]
    picked[:, :, (~inside).flatten().nonzero()[:, 0].to(x.device)] = 0  # what lies in the padding
    rows = picked.unflatten(2, index.shape).transpose(1, 2)  # (n, positions, in, kernel)
    return rows.reshape(len(x), -1, layer.groups, layer.in_channels // layer.groups * math.prod(layer.kernel_size))


def _out_size(layer: LayerSpec, x: Tensor) -> tuple[int, ...]:
    reach = [(k - 1) * s + 1 for k, s in zip(layer.kernel_size, layer.dilation, strict=True)]
    sizes = zip(x.shape[2:], _sides(layer), reach, layer.stride, strict=True)
    return tuple((n + low + high - r) // s + 1 for n, (low, high), r, s in sizes)


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


def _sides(layer: LayerSpec) -> list[tuple[int, int]]:
    """How much is padded before and behind, dimension by dimension."""
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        totals = [s * (k - 1) if same else 0 for k, s in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def _padded(layer: LayerSpec, x: Tensor) -> Tensor:
    sides = [n for pair in reversed(_sides(layer)) for n in pair]
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
