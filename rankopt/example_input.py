"""The input that a study's model is run on once: a shape, a callable, or the first calibration sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankopt.batches import Batch
from rankopt.callables import call, check_spec, load_callable
from rankopt.errors import StudyFileError
from rankopt.layers import as_call
from rankopt.yaml_file import closest, shown

_LARGEST = 2**28


def make(
    given: Any, base_dir: Path, where: str, splits: Callable[[], Mapping[str, list[Batch]]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) from what the study file says; raises `StudyFileError` that begins with `where`."""
    if given is None:
        first = splits()["calibration"][0].take(slice(0, 1))
        return first.args, first.kwargs
    if isinstance(given, str):
        try:
            check_spec(given)
        except ValueError as error:
            raise StudyFileError(f"{where}: needs a shape such as [1, 3, 32, 32], or a callable: {error}") from None
        return _read(call(load_callable(given, base_dir, f"{where}: "), {}, f"{where}."), where)
    shape, dtype = _shape(given, where)
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator).to(dtype),), {}
    return (torch.zeros(shape, dtype=dtype),), {}


def _shape(given: Any, where: str) -> tuple[list[int], torch.dtype]:
    dtype: Any = "float32"
    if isinstance(given, Mapping):
        for key in given:
            if key not in ("shape", "dtype"):
                raise StudyFileError(f"{where}: unknown key {key!r}{closest(key, ('shape', 'dtype'))}")
        given, dtype = given.get("shape"), given.get("dtype", "float32")
    sizes: list[Any] = given if isinstance(given, list) else []
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise StudyFileError(f"{where}: needs a shape of whole numbers, such as [1, 3, 32, 32], got {shown(given)}")
    total = 1
    for size in sizes:
        total *= size
    if total > _LARGEST:
        raise StudyFileError(f"{where}: {shown(given)} has more than {_LARGEST} entries")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype):
        raise StudyFileError(f"{where}.dtype: needs a torch dtype such as float32 or int64, got {dtype!r}")
    return sizes, found


def _read(value: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping):
        return value[0], dict(value[1])
    if isinstance(value, Tensor | tuple):
        return as_call(value)
    raise StudyFileError(f"{where}: must return a tensor, a tuple of arguments or a dict, got {type(value).__name__}")
