"""`Network`: tensors with named modes, multiplied into an input one after the other in the cheapest order.

An order is chosen once, from the sizes alone: dynamic programming over the sets of tensors that are absorbed already.
Every step is one matrix product (a batched one where a mode is shared and stays), so its multiply-accumulates are the
product of all sizes that take part; a step that only scales entries has none. Tensors are never multiplied with each
other first: the input, or the looked-up rows of one tensor, absorb them. `dense` is the exception that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        """An input of (rows, *inputs) absorbs the tensors; MACs are those of one row."""
        return _cheapest(self, self.inputs, self.outputs, {0: 0}, self.tensors)

    def lookup(self) -> Order:
        """Rows are looked up: every tensor with an input mode gives a slice a row. The start is one of those."""
        slices = tuple("".join(m for m in modes if m not in self.inputs) for modes in self.tensors)
        starts = {1 << n: 0 for n, modes in enumerate(self.tensors) if set(modes) & set(self.inputs)}
        return _cheapest(self, "", self.outputs, starts, slices)

    def dense(self) -> Order:
        """All tensors multiplied into one of (outputs, inputs); MACs are those of a call, whatever the rows."""
        starts = {1 << n: 0 for n in range(len(self.tensors))}
        return _cheapest(self, "", self.outputs + self.inputs, starts, self.tensors)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the tensors."""
        return [tuple(self.sizes[m] for m in modes) for modes in self.tensors]

    @property
    def entries(self) -> Any:
        """Of all tensors together."""
        return sum(_product(self.sizes, modes) for modes in self.tensors)


@dataclass(frozen=True)
class Order:
    """A way through a network.

    Attributes:
        macs: multiply-accumulates of all steps (an array where sizes are).
        start: the modes that it begins with.
        steps: (tensor, its modes, modes after the step), in order; where sizes are arrays there are none.
        outputs: the modes that are wanted.
    """

    macs: Any
    start: str
    steps: tuple[tuple[int, str, str], ...]
    outputs: str
    sizes: Mapping[str, Any]
    first: int | None

    def run(self, state: Tensor, tensors: Callable[[int], Tensor], each: Callable[[int], bool]) -> Tensor:
        """Absorb the tensors.

        Args:
            state: (rows, *start).
            tensors: number → the tensor, with the rows in front where `each` says so.
            each: whether a tensor has a slice for every row.

        Returns:
            (rows, *outputs).
        """
        rows, modes = state.shape[0], ROWS + self.start
        sizes: dict[str, Any] = {**self.sizes, ROWS: rows}
        for number, own, after in self.steps:
            modes, state = _step(state, modes, tensors(number), ROWS * each(number) + own, ROWS + after, sizes)
        wanted = ROWS + self.outputs
        return state.permute([modes.index(m) for m in wanted]) if modes != wanted else state


def _step(
    state: Tensor, modes: str, tensor: Tensor, own: str, after: str, sizes: Mapping[str, Any]
) -> tuple[str, Tensor]:
    """One pairwise product; returns the modes in the order in which they come out."""
    shared = [m for m in modes if m in own]
    kept = "".join(m for m in shared if m in after)
    summed = "".join(m for m in shared if m not in after)
    left = "".join(m for m in modes if m not in own)
    right = "".join(m for m in own if m not in modes)

    def size(which: str) -> Any:
        return math.prod(sizes[m] for m in which)

    if not summed and not right:  # entries are scaled
        spread = tensor.permute([own.index(m) for m in kept])
        moved = state.permute([modes.index(m) for m in left + kept])
        return left + kept, moved * spread
    a = state.permute([modes.index(m) for m in kept + left + summed])
    b = tensor.permute([own.index(m) for m in kept + summed + right])
    if kept:
        out = torch.bmm(
            a.reshape(size(kept), size(left), size(summed)), b.reshape(size(kept), size(summed), size(right))
        )
    else:
        out = a.reshape(size(left), size(summed)) @ b.reshape(size(summed), size(right))
    return kept + left + right, out.reshape([sizes[m] for m in kept + left + right])


def _product(sizes: Mapping[str, Any], modes: Sequence[str]) -> Any:
    total: Any = 1
    for mode in modes:
        total = total * sizes[mode]
    return total


def _cheapest(network: Network, start: str, outputs: str, starts: Mapping[int, int], tensors: Sequence[str]) -> Order:
    """Dynamic programming over sets of absorbed tensors (bits), smallest sets first."""
    count = len(tensors)
    search = _Search(network.sizes, start, outputs, tuple(tensors))
    cost: dict[int, Any] = dict(starts)
    last: dict[int, tuple[int, int]] = {}
    for taken in range(1, count + 1):
        for chosen in combinations(range(count), taken):
            whole = sum(1 << n for n in chosen)
            for n in chosen:
                before = whole - (1 << n)
                if before not in cost or whole in starts:
                    continue
                total = cost[before] + search.macs(before, n)
                if whole not in cost:
                    cost[whole], last[whole] = total, (before, n)
                elif isinstance(total, np.ndarray) or isinstance(cost[whole], np.ndarray):
                    cost[whole] = np.minimum(cost[whole], total)
                elif total < cost[whole]:
                    cost[whole], last[whole] = total, (before, n)
    at, steps = (1 << count) - 1, list[tuple[int, str, str]]()
    while at in last:
        before, n = last[at]
        steps.append((n, tensors[n], search.open(at)))
        at = before
    first = at.bit_length() - 1 if at else None
    begin = start if first is None else tensors[first]
    return Order(cost[(1 << count) - 1], begin, tuple(steps[::-1]), outputs, network.sizes, first)


class _Search:
    """Modes that are open after a set of tensors was absorbed, and what the next one costs."""

    def __init__(self, sizes: Mapping[str, Any], start: str, outputs: str, tensors: tuple[str, ...]) -> None:
        self.sizes, self.start, self.outputs, self.tensors = sizes, start, outputs, tensors
        self._open: dict[int, str] = {}

    def open(self, absorbed: int) -> str:
        if absorbed not in self._open:
            inside = [modes for n, modes in enumerate(self.tensors) if absorbed >> n & 1]
            outside = {m for n, modes in enumerate(self.tensors) if not absorbed >> n & 1 for m in modes}
            seen = dict.fromkeys([*self.start, *(m for modes in inside for m in modes)])
            self._open[absorbed] = "".join(m for m in seen if m in outside or m in self.outputs)
        return self._open[absorbed]

    def macs(self, before: int, n: int) -> Any:
        now, own = self.open(before), self.tensors[n]
        after = self.open(before | 1 << n)
        if set(own) <= set(now) and set(now) <= set(after):
            return 0
        return _product(self.sizes, list(dict.fromkeys(now + own)))


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
