"""`Network`: tensors with named modes whose product is the weight of a linear layer or an embedding.

The input, or rows that are looked up, absorb the tensors in the cheapest order (`rankopt.nn.contraction`); tensors are
never multiplied with each other first. `dense` is the exception that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rankopt.nn.contraction import Order, cheapest

ROWS = "*"  # the mode of the batch


@dataclass(frozen=True)
class Network:
    """Modes are single letters.

    Attributes:
        inputs, outputs: the modes of the input and of the output, in order.
        tensors: the modes of every tensor, in order.
        sizes: mode → size; integer arrays where many ranks are costed at once.
    """

    inputs: str
    outputs: str
    tensors: tuple[str, ...]
    sizes: Mapping[str, Any]

    def turned(self) -> Network:
        """The same tensors from the outputs to the inputs."""
        return Network(self.outputs, self.inputs, self.tensors, self.sizes)

    def rows(self) -> Order:
        """(rows, *inputs) and the tensors to (rows, *outputs); costs are those of one row."""
        operands = [ROWS + self.inputs, *self.tensors]
        return cheapest(operands, [0], ROWS + self.outputs, {**self.sizes, ROWS: 1})

    def lookup(self) -> Order:
        """Slices, (rows, *others) of tensors with input modes, to (rows, *outputs); costs are those of one row."""
        looked = [n for n, modes in enumerate(self.tensors) if set(modes) & set(self.inputs)]
        slices = [ROWS * (n in looked) + self.others(n) for n in range(len(self.tensors))]
        return cheapest(slices, looked, ROWS + self.outputs, {**self.sizes, ROWS: 1})

    def dense(self) -> Order:
        """All tensors to one of (*outputs, *inputs); costs are those of a call, whatever the rows."""
        return cheapest(self.tensors, range(len(self.tensors)), self.outputs + self.inputs, self.sizes)

    def others(self, n: int) -> str:
        """The modes of a tensor that are not the input's."""
        return "".join(mode for mode in self.tensors[n] if mode not in self.inputs)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors."""
        return [tuple(self.sizes[m] for m in modes) for modes in self.tensors]

    @property
    def entries(self) -> Any:
        """Of all tensors together."""
        total: Any = 0
        for modes in self.tensors:
            size: Any = 1
            for mode in modes:
                size = size * self.sizes[mode]
            total = total + size
        return total


class Digits:
    """Row numbers as digits of a mixed base."""

    def __init__(self, bases: Sequence[int]) -> None:
        self.bases = tuple(bases)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """What a step of every digit counts."""
        return tuple(math.prod(self.bases[n + 1 :]) for n in range(len(self.bases)))

    def of(self, rows: Tensor) -> list[Tensor]:
        """(rows,) → a tensor a digit, the most significant first."""
        return [
            torch.div(rows, stride, rounding_mode="floor") % base
            for stride, base in zip(self.strides, self.bases, strict=True)
        ]
