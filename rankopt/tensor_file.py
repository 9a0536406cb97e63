"""A module's values in one safetensors file: `write_tensors`, and `read_tensors` into a module of the same shape.

The header of a file that is read is checked in full before a value is loaded: no key twice, known dtypes, shapes that
fill exactly the bytes that are there. See https://github.com/huggingface/safetensors for the format.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankopt.errors import ArtifactError
from rankopt.untrusted import opened, parse_json

_ALIASES = "aliases"  # metadata: JSON of name → the name that the same tensor is stored under
_LARGEST_HEADER = 32 * 2**20
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(path: Path, module: nn.Module) -> None:
    """Write the state dict; a tensor with several names is stored once. Raises `ArtifactError` naming the entry."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{name}: is a {type(value).__name__}; only tensors can be saved without pickle")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            state = "on the meta device" if value.is_meta else "quantized or sparse"
            raise ArtifactError(f"{name}: is {state}; only dense tensors with values can be saved")
        if _has_nan(value):
            raise ArtifactError(f"{name}: holds NaN, so the model is broken; it is not saved")
        place = value.untyped_storage().data_ptr()
        key = (place, value.storage_offset(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A copy where another entry lies in the same memory, which the format does not allow.
        stored[name] = value.detach().contiguous().clone() if place in storages else value.detach().contiguous()
        storages.add(place)
    try:
        save_file(stored, path, metadata={_ALIASES: json.dumps(aliases)})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path.name}: can't hold this model's values: {_first_line(error)}") from error


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What a safetensors file holds, and its metadata, without loading a value.

    Raises:
        ArtifactError: it is damaged; says how. The memory that is needed is that of the header, at most 32 MiB.
    """
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ArtifactError(f"{path}: is damaged: it does not begin with the length of a header")
        header = parse_json(file.read(length), f"{path}: is damaged: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path}: is damaged: its metadata are not texts")
    spans: list[tuple[int, int]] = []
    stored = {name: _stored(path, name, entry, spans) for name, entry in header.items()}
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ArtifactError(f"{path}: is damaged: its tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != size - 8 - length:
        raise ArtifactError(f"{path}: is damaged: its header speaks of {end} bytes, there are {size - 8 - length}")
    return stored, metadata


def read_tensors(path: Path, module: nn.Module) -> None:
    """Fill `module` in place with the values of a file that `write_tensors` wrote.

    Raises `ArtifactError` when the file is damaged, or an entry is missing, unexpected, of another shape or dtype, or
    NaN; `module` is then unchanged.
    """
    stored, metadata = read_header(path)
    aliases, expected = _aliases(metadata, path), module.state_dict()
    for name, wanted in expected.items():
        found = stored.get(aliases.get(name, name))
        if found is None:
            raise ArtifactError(f"{path}: lacks {name}; it was saved from another model or plan")
        _check_entry(path, name, wanted, found)
    unexpected = [name for name in [*stored, *aliases] if name not in expected]
    if unexpected:
        raise ArtifactError(f"{path}: holds {unexpected[0][:200]}, which the model does not have")
    try:
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in stored}
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or _first_line(error)}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(f"{path}: is damaged: {_first_line(error)}") from None
    for name, value in tensors.items():
        if _has_nan(value):
            raise ArtifactError(f"{path}: {name} holds NaN, which rankopt never saves")
    try:
        module.load_state_dict({name: tensors[aliases.get(name, name)] for name in expected})
    except RuntimeError as error:  # a module with a loading of its own
        raise ArtifactError(f"{path}: {' '.join(str(error).split())}") from error


def _stored(path: Path, name: str, entry: Any, spans: list[tuple[int, int]]) -> StoredTensor:
    where = f"{path}: is damaged: {name[:200]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} must have dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ArtifactError(f"{where} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        whole = isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or len(numbers) > 64 or any(not 0 <= n < 2**62 for n in numbers):
            raise ArtifactError(f"{where} needs whole numbers as shape and data_offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ArtifactError(f"{where} of shape {str(shape)[:80]} does not fill the bytes {str(offsets)[:60]}")
    spans.append((offsets[0], offsets[1]))
    return StoredTensor(dtype, tuple(shape))


def _check_entry(path: Path, name: str, wanted: Any, found: StoredTensor) -> None:
    if not isinstance(wanted, Tensor):
        raise ArtifactError(f"{name}: the model keeps a {type(wanted).__name__} there, which no tensor can fill")
    if wanted.is_meta:
        raise ArtifactError(f"{name}: is on the meta device; give a dense model on a device that holds values")
    for what, need, got in (("shape", tuple(wanted.shape), found.shape), ("dtype", wanted.dtype, found.dtype)):
        if need != got:
            raise ArtifactError(f"{path}: {name} needs the {what} {need}, got {got}")


def _has_nan(value: Tensor) -> bool:
    """Infinity is let through: masks hold it."""
    if not (value.is_floating_point() or value.is_complex()) or value.numel() == 0:
        return False
    return bool(torch.isnan(value if value.dtype.itemsize > 1 else value.float()).any())


def _aliases(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    try:
        aliases = parse_json(metadata.get(_ALIASES, "{}"), "aliases")
    except ArtifactError:
        aliases = {"": None}
    if not all(isinstance(v, str) for v in aliases.values()):
        raise ArtifactError(f"{path}: is damaged: its table of shared tensors can't be read")
    return aliases


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
