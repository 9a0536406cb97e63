"""`LayerSpec`: what a decomposition has to know of a layer, and `group_weight`: its weight with the groups in front.

What there is to know of the kinds of layers is in `rankopt.kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankopt.errors import LayerError


@dataclass(frozen=True)
class Call:
    """One call of a layer on the example input: `batch` independent items, spatial sizes in and out (() for Linear).

    `macs` are those of this call where they do not follow from the weight's shape; 0 where a table is looked up. `note`
    is what methods for this kind of layer must know of the call.
    """

    batch: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    macs: int | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerSpec:
    """What a decomposition has to know of a layer. `skip` says why it is left alone (None: it can be decomposed).

    `kernel_size`, `stride`, `dilation`, `output_padding` have one entry a spatial dimension (empty for Linear);
    `padding` is that too, or the text "same". `aliases` are further names of the same module. `flipped`: the weight is
    kept as (in, out), as Conv1D of transformers and embeddings do. `tied` names linear layers that hold the same weight
    turned around and are replaced together with this one (the output head of a language model). `facts` is what only
    methods for this kind ask for, such as ``(("heads", 8),)``. `own_params` are the parameter entries of a layer that
    is not one weight and a bias. `padding_filled`: the row of an embedding's ``padding_idx`` is not zero, which depends
    on the weights and so is no part of the architecture.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()
    bias: bool = True
    calls: tuple[Call, ...] = ()
    aliases: tuple[str, ...] = ()
    skip: str | None = None
    dtype: str = "float32"
    flipped: bool = False
    tied: tuple[str, ...] = ()
    facts: tuple[tuple[str, Any], ...] = ()
    own_params: int | None = None
    padding_filled: bool = field(default=False, compare=False)
    order: int = field(default=0, compare=False)

    @property
    def dims(self) -> int:
        """The number of spatial dimensions: 0 for Linear, 1 to 3 for convolutions."""
        return len(self.kernel_size)

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def group_shape(self) -> tuple[int, ...]:
        """The weight's shape with the groups in front: (groups, out/groups, in/groups, *kernel_size)."""
        g = self.groups
        return (g, self.out_channels // g, self.in_channels // g, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the module's own ``weight``."""
        g, o, i, *k = self.group_shape
        return (g * i, o, *k) if self.transposed or self.flipped else (g * o, i, *k)

    @property
    def depthwise(self) -> bool:
        """Whether every group has a single input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def params(self) -> int:
        """Weight and bias entries."""
        if self.own_params is not None:
            return self.own_params
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls on the example input (without the bias, as counters do)."""
        per_item = math.prod(self.weight_shape)
        return sum(
            c.batch * math.prod(c.in_size if self.transposed else c.out_size) * per_item if c.macs is None else c.macs
            for c in self.calls
        )

    def fact(self, name: str) -> Any:
        """One of `facts`; raises `KeyError` where the layer's kind does not say it."""
        return dict(self.facts)[name]

    def describe(self) -> str:
        """Kind and weight shape on one line, for messages and tables."""
        text = f"{self.kind} {'×'.join(map(str, self.weight_shape))}"
        text = f"{text} (in × out)" if self.flipped else text
        return f"{text} groups {self.groups}" if self.groups > 1 else text


def group_weight(layer: LayerSpec, weight: Tensor) -> Tensor:
    """The module's weight as (groups, out/groups, in/groups, *kernel). A view where possible."""
    g, o, i, *k = layer.group_shape
    if tuple(weight.shape) != layer.weight_shape:
        raise LayerError(f"{layer.name}: needs a weight of shape {layer.weight_shape}, got {tuple(weight.shape)}")
    if layer.transposed or layer.flipped:
        return weight.reshape(g, i, o, *k).transpose(1, 2)
    return weight.reshape(g, o, i, *k)


def ungroup_weight(layer: LayerSpec, weight: Tensor) -> Tensor:
    """The inverse of `group_weight`."""
    swapped = layer.transposed or layer.flipped
    return (weight.transpose(1, 2) if swapped else weight).reshape(layer.weight_shape)


def apart(layers: Iterable[LayerSpec]) -> list[LayerSpec]:
    """Those whose costs are their own: neither inside of another layer of the list nor tied to one.

    The costs of a layer that consists of layers (attention) hold theirs, as those of an embedding do its tied head's.
    """
    layers = list(layers)
    tied = {name for layer in layers for name in layer.tied}
    return [layer for layer in layers if layer.name not in tied and not any(inside(layer, la) for la in layers)]


def inside(layer: LayerSpec, outer: LayerSpec) -> bool:
    """Whether a layer is a part of another one."""
    names = (layer.name, *layer.aliases)
    return any(name.startswith(f"{o}.") if o else bool(name) for o in (outer.name, *outer.aliases) for name in names)
