"""Nests: tensors inside tuples, lists and dicts, as models take and return them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mapped(value: Any, change: Callable[[Tensor], Any] = lambda tensor: tensor) -> Any:
    """The same nest with every tensor changed; arrays become tensors, mappings dicts."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [mapped(entry, change) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nest, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def with_batch(inputs: tuple[tuple[Any, ...], dict[str, Any]], batch: int | None) -> Any:
    """The example input with this batch size: every tensor whose first dimension is that of the first one."""
    first = next(iter(tensors(inputs)), None)
    if batch is None or first is None or first.dim() == 0:
        return inputs
    size = first.shape[0]

    def sized(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size:
            return tensor
        return torch.cat([tensor] * -(-batch // size))[:batch].contiguous()

    return mapped(inputs, sized)


class UnlikeError(Exception):
    """Nests that can't be put into one."""


def joined(values: Sequence[Any]) -> Any:
    """Nests of one form as one, tensors concatenated along dimension 0; raises `UnlikeError` where they differ."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UnlikeError
    if isinstance(first, Tensor) and first.dim() > 0:
        if any(value.shape[1:] != first.shape[1:] or value.dtype != first.dtype for value in values):
            raise UnlikeError
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise UnlikeError
        return {key: joined([value[key] for value in values]) for key in first}
    if isinstance(first, list | tuple):
        if any(len(value) != len(first) for value in values):
            raise UnlikeError
        entries = [joined(column) for column in zip(*values, strict=True)]
        return entries if isinstance(first, list) else tuple(entries)
    if any(not bool(torch.equal(v, first) if isinstance(first, Tensor) else v == first) for v in values):
        raise UnlikeError
    return first


def shapes(inputs: Any) -> str:
    """Shape and dtype of every tensor, as a text: ``1x3x32x32 float32``."""
    return ", ".join(f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for t in tensors(inputs))
