"""`Rebuilt`: a linear layer or convolution that stores factors and makes its weight of them in every call.

The weight is an elementwise function of a product of factors: `multiplied` is the product, `dense_weight` the function.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUNCTIONS = ("relu", "sin")


def multiplied(factors: Sequence[Tensor]) -> Tensor:
    """The product of factors (groups, ...) as a tensor whose modes are theirs.

    - two (a, rank), (rank, b): the matrix (a, b);
    - three (a, rank), (b, rank), (c, rank): the sum of rank-one terms (a, b, c);
    - four, a core (p, q, s) and (a, p), (b, q), (c, s): the Tucker tensor (a, b, c), the modes in the cheapest order.
    """
    if len(factors) == 2:
        return torch.bmm(*factors)
    groups = factors[0].shape[0]
    if len(factors) == 3:
        first, second, third = factors
        pairs = (second[:, :, None] * third[:, None]).flatten(1, 2)
        return torch.bmm(first, pairs.transpose(1, 2)).reshape(groups, first.shape[1], second.shape[1], third.shape[1])
    core, *sides = factors
    for mode in cheapest([s.shape[1] for s in sides], [s.shape[2] for s in sides])[0]:
        moved = core.movedim(mode + 1, -1)
        rows = torch.bmm(moved.reshape(groups, -1, moved.shape[-1]), sides[mode].transpose(1, 2))
        core = rows.reshape(*moved.shape[:-1], -1).movedim(-1, mode + 1)
    return core


def cheapest(sizes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The order in which the modes of a Tucker core are multiplied at the least cost, and the multiply-accumulates."""
    found = []
    for order in itertools.permutations(range(len(sizes))):
        shape, macs = list(ranks), 0
        for mode in order:
            shape[mode] = sizes[mode]
            macs += _product(shape) * ranks[mode]
        found.append((macs, order))
    macs, order = min(found)
    return order, macs


def dense_weight(function: str, side: int, factors: Sequence[Tensor]) -> Tensor:
    """The weight (groups, out, in·kernel, or out, in, kernel) that factors stand for.

    Args:
        function: "relu": the product is twice as long along one side, and the weight is the rectified first half less
            the rectified second; "sin": the first factor (groups,) times the sine of the product.
        side: which side it is, 1 for the outputs, 2 for the inputs.
        factors: see `multiplied`; with "sin" behind the amplitude.
    """
    if function == "sin":
        amplitude, *rest = factors
        product = multiplied(rest)
        return amplitude.reshape(-1, *(1,) * (product.dim() - 1)) * torch.sin(product)
    upper, lower = multiplied(factors).chunk(2, dim=side)
    return upper.relu() - lower.relu()


class Rebuilt(nn.Module):
    """A layer whose weight is made of factors in every call.

    Args:
        function, side, factors: see `dense_weight`.
        bias: of the layer.
        options: of the layer: ``kind`` ("linear", "conv2d", "conv_transpose1d", ...), ``kernel_size``, ``groups``,
            ``stride``, ``padding``, ``dilation``, ``padding_mode``, ``output_padding``, and ``flipped`` where a linear
            layer keeps its weight as (in, out).
    """

    def __init__(
        self, function: str, side: int, factors: Sequence[Tensor], bias: Tensor | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.function, self.side, self.options = function, side, dict(options)
        self.factors = nn.ParameterList([nn.Parameter(f.detach().clone()) for f in factors])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def grouped(self) -> Tensor:
        """The weight with the groups in front: (groups, out, in, *kernel), with gradients to the factors."""
        weight = dense_weight(self.function, self.side, list(self.factors))
        return weight.reshape(*weight.shape[:2], -1, *self.options["kernel_size"])

    @property
    def weight(self) -> Tensor:
        """The weight as the class of layer that stood here keeps it."""
        weight, kind = self.grouped(), self.options["kind"]
        if kind == "linear":
            return weight[0].T if self.options["flipped"] else weight[0]
        if kind.startswith("conv_transpose"):
            weight = weight.transpose(1, 2)
        return weight.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer with this weight computes."""
        options, weight = self.options, self.grouped()
        if options["kind"] == "linear":
            return F.linear(x, weight[0], self.bias)
        dims, rest = len(options["kernel_size"]), (options["stride"], options["padding"])
        if options["kind"].startswith("conv_transpose"):
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            w = weight.transpose(1, 2).flatten(0, 1)
            return function(x, w, self.bias, *rest, options["output_padding"], options["groups"], options["dilation"])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        if options["padding_mode"] != "zeros":
            x, rest = F.pad(x, self._sides(), mode=options["padding_mode"]), (options["stride"], 0)
        return convolve(x, weight.flatten(0, 1), self.bias, *rest, options["dilation"], options["groups"])

    def _sides(self) -> list[int]:
        """What is padded at the beginning and end of every spatial dimension, the last one first."""
        sides: list[int] = []
        for d in reversed(range(len(self.options["kernel_size"]))):
            reach = self.options["dilation"][d] * (self.options["kernel_size"][d] - 1)
            padding = self.options["padding"]
            sides += [reach // 2, reach - reach // 2] if padding == "same" else [padding[d], padding[d]]
        return sides

    def extra_repr(self) -> str:
        """Shown by print."""
        shapes = ", ".join("×".join(map(str, f.shape[1:])) or "1" for f in self.factors)
        return f"{self.function} of {shapes}; {self.options['kind']}"


def _product(values: Sequence[int]) -> int:
    total = 1
    for value in values:
        total = total * value
    return total
