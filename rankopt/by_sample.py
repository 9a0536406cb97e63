"""What a layer sees, sample by sample: with a batch dimension, and with the samples in dimension 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankopt.layer_spec import LayerSpec
from rankopt.nest import tensors


class MixedError(Exception):
    """Rows of several samples that can't be told apart."""


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first thing that a module is called with."""
    found: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else tensors(dict(kwargs))[0]
    return found


def batched(layer: LayerSpec, x: Tensor) -> Tensor:
    """With a batch dimension."""
    alone = x.dim() == (layer.dims + 1 if layer.dims else 2 if layer.groups > 1 else 1)
    return x.unsqueeze(0) if alone else x


def out_size(layer: LayerSpec, x: Tensor) -> tuple[int, ...]:
    """The spatial sizes of a convolution's output."""
    size = []
    for d, n in enumerate(x.shape[2:]):
        reach = layer.dilation[d] * (layer.kernel_size[d] - 1)
        if layer.transposed:
            size.append((n - 1) * layer.stride[d] - 2 * int(layer.padding[d]) + reach + layer.output_padding[d] + 1)
        else:
            padding = reach if isinstance(layer.padding, str) else 2 * layer.padding[d]
            size.append((n + padding - reach - 1) // layer.stride[d] + 1)
    return tuple(size)


def by_sample(layer: LayerSpec, x: Tensor, samples: int, alone: tuple[int, ...], tokens: bool = False) -> Tensor:
    """Bring the samples to dimension 0: windows of one sample stand together, sequence-first inputs are turned.

    Args:
        layer: the layer.
        x: its input or output, or a gradient.
        samples: how many there are.
        alone: the shape of the layer's input when the model is run on a single sample.
        tokens: whether the input are row numbers, without a dimension for channels.

    Raises `MixedError` where the rows do not grow with the samples (a table of positions, one call for each sample).
    """
    rows = x.shape[0]
    turned = layer.dims == 0 and len(alone) >= (2 if tokens else 3) and alone[0] > 1 and alone[1] == 1
    if turned and x.shape[1] == samples:
        return x.transpose(0, 1)
    if rows == samples and (alone[0] == 1 or samples == 1):
        return x
    if rows % samples == 0 and (rows != alone[0] or samples == 1):
        return x.reshape(samples, rows // samples, *x.shape[1:])
    raise MixedError(f"{layer.name} sees {rows} rows for {samples} samples")
