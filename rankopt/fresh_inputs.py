"""Inputs like an example, of any batch size: `described` as JSON, and `fresh` ones made from the description.

A tensor is described by its shape, dtype and range of values: floating ones by mean and spread too, so that fresh ones
are drawn from a normal distribution; whole numbers (token ids, masks) are drawn evenly between the least and the
largest that the example holds. A tensor whose first dimension is that of the first tensor carries the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankopt.errors import ArtifactError, DataError
from rankopt.nest import tensors

_LARGEST = 2**28  # entries of one tensor
_DEPTH = 16
_TENSOR = {"shape", "dtype", "batched", "low", "high", "mean", "std"}
Call = tuple[tuple[Any, ...], dict[str, Any]]


def described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call as JSON; raises `DataError` when it holds what JSON can't (an object of some class)."""
    first = next(iter(tensors((args, dict(kwargs)))), None)
    size = first.shape[0] if first is not None and first.dim() else None
    return {
        "args": [_described(value, size, f"argument {n}") for n, value in enumerate(args)],
        "kwargs": {str(key): _described(value, size, str(key)) for key, value in kwargs.items()},
    }


def fresh(description: Mapping[str, Any], batch: int | None = None, seed: int = 0, where: str = "inputs") -> Call:
    """A call with new values; the description may come from a file, so it is checked.

    Raises:
        ArtifactError: it is malformed, or a tensor would have more than 2**28 entries.
    """
    if not isinstance(description, Mapping) or set(description) != {"args", "kwargs"}:
        raise ArtifactError(f"{where}: must hold args and kwargs")
    args, kwargs = description["args"], description["kwargs"]
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ArtifactError(f"{where}: args must be a list and kwargs an object")
    generator = torch.Generator().manual_seed(seed)
    make = _Maker(batch, generator)
    return (
        tuple(make(value, f"{where}.args[{n}]") for n, value in enumerate(args)),
        {key: make(value, f"{where}.kwargs.{key[:40]}") for key, value in kwargs.items()},
    )


def _described(value: Any, size: int | None, where: str) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"tensor": _statistics(value, size)}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return {"value": value}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_described(entry, size, f"{where}[{n}]") for n, entry in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _described(entry, size, f"{where}.{key}") for key, entry in value.items()}}
    raise DataError(f"example input: {where} is a {type(value).__name__}; an export takes tensors, numbers and texts")


def _statistics(value: Tensor, size: int | None) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    batched = value.dim() > 0 and value.shape[0] == size
    out: dict[str, Any] = {"shape": list(value.shape), "dtype": dtype, "batched": batched}
    if value.is_floating_point():
        known = value.detach().double()
        known = known[torch.isfinite(known)]
        spread = float(known.std(correction=0)) if known.numel() else 1.0
        return out | {"mean": float(known.mean()) if known.numel() else 0.0, "std": spread}
    if value.numel() == 0:
        return out | {"low": 0, "high": 0}
    return out | {"low": int(value.min()), "high": int(value.max())}


class _Maker:
    """Turns a description back into values."""

    def __init__(self, batch: int | None, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator

    def __call__(self, value: Any, where: str, depth: int = 0) -> Any:
        if not isinstance(value, dict) or len(value) != 1 or depth > _DEPTH:
            raise ArtifactError(f"{where}: must be an object with one of tensor, value, list, tuple, dict")
        ((kind, entry),) = value.items()
        if kind == "tensor":
            return self.tensor(entry, where)
        if kind == "value" and (entry is None or isinstance(entry, bool | int | float | str)):
            return entry
        if kind in ("list", "tuple") and isinstance(entry, list):
            made = [self(one, f"{where}[{n}]", depth + 1) for n, one in enumerate(entry)]
            return made if kind == "list" else tuple(made)
        if kind == "dict" and isinstance(entry, dict):
            return {key: self(one, f"{where}.{key[:40]}", depth + 1) for key, one in entry.items()}
        raise ArtifactError(f"{where}: {str(kind)[:40]!r} does not hold what it should")

    def tensor(self, entry: Any, where: str) -> Tensor:
        if not isinstance(entry, dict) or set(entry) - _TENSOR or not isinstance(entry.get("batched"), bool):
            raise ArtifactError(f"{where}: a tensor must hold shape, dtype, batched, and low and high or mean and std")
        shape, dtype = self.shape(entry, where), getattr(torch, str(entry.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ArtifactError(f"{where}: {str(entry.get('dtype'))[:40]!r} is no dtype")
        numbers = ("mean", "std") if dtype.is_floating_point else ("low", "high")
        first, second = (entry.get(name) for name in numbers)
        if not all(isinstance(n, int | float) and abs(n) < 2**53 and not isinstance(n, bool) for n in (first, second)):
            raise ArtifactError(f"{where}: {numbers[0]} and {numbers[1]} must be numbers")
        assert first is not None
        assert second is not None
        if dtype.is_floating_point:
            return (torch.randn(shape, generator=self.generator) * second + first).to(dtype)
        low, high = int(first), int(second)
        if low > high:
            raise ArtifactError(f"{where}: low is above high")
        return torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)

    def shape(self, entry: dict[str, Any], where: str) -> list[int]:
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
            raise ArtifactError(f"{where}: shape must be a list of whole numbers")
        sizes = [self.batch, *shape[1:]] if entry["batched"] and self.batch is not None and shape else list(shape)
        if len(sizes) > 16 or any(n < 0 for n in sizes) or math.prod(sizes) > _LARGEST:
            raise ArtifactError(f"{where}: a tensor of shape {str(sizes)[:80]} has more than {_LARGEST} entries")
        return sizes
