"""Sums of products of tensors, two at a time, in the order that costs least.

Tensors' dimensions have letters; a letter that several share and that the result lacks is summed over, as in
``einsum``. `contract` is one step, a single matrix product. `cheapest` finds the order for one result by dynamic
programming over the subsets of the operands, from the sizes alone, so that a loaded model takes the same one.

Only orders are considered in which every step has an operand that carries data: a product of weights alone would be a
part of the dense weight rebuilt in every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

Sizes = Mapping[str, Any]  # whole numbers, or arrays of them when many are costed at once
Step = tuple[int, int, str]  # two operands, and the letters of what they become, which is appended to the operands


@dataclass(frozen=True)
class Order:
    """An order of steps for one result, costed.

    Attributes:
        operands: the letters of every operand.
        result: the letters of the result.
        products: multiplications, also of steps that sum over nothing. Orders are chosen by it.
        macs: those of steps that sum over something, which is what counters of matrix products see.
        steps: in order; none where sizes were arrays.
    """

    operands: tuple[str, ...]
    result: str
    products: Any
    macs: Any
    steps: tuple[Step, ...] = ()

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Carry the steps out; a single operand is brought into the order of the result."""
        values, names = list(tensors), list(self.operands)
        for left, right, out in self.steps:
            values.append(contract(values[left], names[left], values[right], names[right], out))
            names.append(out)
        return values[-1].permute(*(names[-1].index(letter) for letter in self.result))


@cache
def _splits(count: int, data: int) -> tuple[tuple[int, tuple[tuple[int, int], ...]], ...]:
    """Every subset of operands (as bits) with at least two members, small ones first, and the pairs it can be cut in.

    `data` has the bits of the operands that carry data; a pair has data on at least one side, which must hold for what
    is inside each side too, so a side without data is a single operand.
    """
    found = []
    for subset in sorted(range(1, 2**count), key=lambda bits: bits.bit_count()):
        if subset.bit_count() < 2 or not subset & data:
            continue
        pairs, part = [], (subset - 1) & subset
        while part:
            other = subset ^ part
            if part > other and all(side & data or side.bit_count() == 1 for side in (part, other)):
                pairs.append((part, other))
            part = (part - 1) & subset
        found.append((subset, tuple(pairs)))
    return tuple(found)


def cheapest(operands: Sequence[str], data: Sequence[int], result: str, sizes: Sizes) -> Order:
    """The cheapest order, with its steps where the sizes are whole numbers.

    Args:
        operands: the letters of every operand.
        data: which of them carry data.
        result: the letters of the result.
        sizes: letter → size.
    """
    carrying = sum(1 << n for n in data)
    used = sorted(set("".join(operands)))
    if any(np.ndim(sizes[letter]) for letter in used):
        return _search(tuple(operands), carrying, result, sizes)
    return _found(tuple(operands), carrying, result, tuple((letter, int(sizes[letter])) for letter in used))


@cache
def _found(operands: tuple[str, ...], data: int, result: str, sizes: tuple[tuple[str, int], ...]) -> Order:
    """Kept, since descents on the tensors of a network ask for the same order again and again."""
    return _search(operands, data, result, dict(sizes))


def _search(operands: tuple[str, ...], data: int, result: str, sizes: Sizes) -> Order:
    """The dynamic programming; the bits of `data` say which operands carry some."""
    count, everything = len(operands), 2 ** len(operands) - 1
    kept = [_kept(operands, bits, result) for bits in range(everything + 1)]
    cost: dict[int, tuple[Any, Any]] = {1 << n: (0, 0) for n in range(count)}
    choice: dict[int, Any] = {}
    for subset, pairs in _splits(count, data):
        best: tuple[Any, Any] | None = None
        for number, (left, right) in enumerate(pairs):
            letters = sorted(set(kept[left]) | set(kept[right]))
            size: Any = 1
            for letter in letters:
                size = size * sizes[letter]
            summed = any(letter not in kept[subset] for letter in letters)
            products = cost[left][0] + cost[right][0] + size
            macs = cost[left][1] + cost[right][1] + (size if summed else 0)
            if best is None:
                best, choice[subset] = (products, macs), number
            elif np.ndim(products) or np.ndim(best[0]):
                better = products < best[0]
                best = np.where(better, products, best[0]), np.where(better, macs, best[1])
            elif products < best[0]:
                best, choice[subset] = (products, macs), number
        if best is not None:
            cost[subset] = best
    products, macs = cost[everything]
    if np.ndim(products):
        return Order(operands, result, products, macs)
    steps: list[Step] = []
    cuts = dict(_splits(count, data))

    def take(subset: int) -> int:
        """The operand that this subset becomes."""
        if subset.bit_count() == 1:
            return subset.bit_length() - 1
        left, right = cuts[subset][choice[subset]]
        pair = take(left), take(right)
        steps.append((*pair, result if subset == everything else kept[subset]))
        return count + len(steps) - 1

    take(everything)
    return Order(operands, result, products, macs, tuple(steps))


def contract(a: Tensor, a_letters: str, b: Tensor, b_letters: str, out: str) -> Tensor:
    """One step: the sum over the letters that both have and `out` lacks, as a single (batched) matrix product.

    Every letter of `out` stands in `a_letters` or `b_letters`; a letter that `out` lacks stands in both.
    """
    size = dict(zip(a_letters, a.shape, strict=True)) | dict(zip(b_letters, b.shape, strict=True))
    batch = [x for x in a_letters if x in b_letters and x in out]
    summed = [x for x in a_letters if x in b_letters and x not in out]
    rows = [x for x in a_letters if x not in b_letters]
    columns = [x for x in b_letters if x not in a_letters]
    left = _arranged(a, a_letters, [batch, rows, summed], size)
    right = _arranged(b, b_letters, [batch, summed, columns], size)
    product = left @ right if summed else left * right
    spread = product.reshape(*(size[x] for x in (*batch, *rows, *columns)))
    return spread.permute(*("".join([*batch, *rows, *columns]).index(x) for x in out))


def _arranged(x: Tensor, letters: str, groups: Sequence[Sequence[str]], size: Mapping[str, Any]) -> Tensor:
    """The dimensions in the order of the groups, those of a group as one; no batch where there is none."""
    ordered = x.permute(*(letters.index(letter) for group in groups for letter in group))
    shape = [math.prod(size[letter] for letter in group) for group in groups]
    return ordered.reshape(shape if groups[0] else shape[1:])


def _kept(operands: Sequence[str], subset: int, result: str) -> str:
    """The letters that a subset's product must keep: those of the result, and those that others have."""
    inside = [letters for n, letters in enumerate(operands) if subset >> n & 1]
    outside = set(result).union(*(letters for n, letters in enumerate(operands) if not subset >> n & 1))
    seen = dict.fromkeys(letter for letters in inside for letter in letters)
    return "".join(letter for letter in seen if letter in outside)
