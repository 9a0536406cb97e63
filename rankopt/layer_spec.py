"""`LayerSpec`: what a decomposition has to know of a layer, and `group_weight`: its weight with the groups in front."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from rankopt.errors import LayerError

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
}


@dataclass(frozen=True)
class Call:
    """One call of a layer on the example input: `batch` independent items, spatial sizes in and out (() for Linear)."""

    batch: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """What a decomposition has to know of a layer. `skip` says why it is left alone (None: it can be decomposed).

    `kernel_size`, `stride`, `dilation`, `output_padding` have one entry a spatial dimension (empty for Linear);
    `padding` is that too, or the text "same". `aliases` are further names of the same module. `flipped`: a linear layer
    that keeps its weight as (in, out), as Conv1D of transformers does.
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
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls on the example input (without the bias, as counters do)."""
        per_item = math.prod(self.weight_shape)
        return sum(c.batch * math.prod(c.in_size if self.transposed else c.out_size) * per_item for c in self.calls)

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


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer (a subclass has its parent's), None when it is no layer that can be decomposed."""
    if is_flipped(module):
        return "linear"
    for cls, kind in KINDS.items():
        if isinstance(module, cls):
            return kind
    return None


def is_flipped(module: nn.Module) -> bool:
    """Whether this is Conv1D of transformers (GPT-2 and its kin): a linear layer whose weight is (in, out).

    By name, so that transformers is not imported where nobody uses it.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
