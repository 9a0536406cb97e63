"""A module's values in one safetensors file: `write_tensors`, and `read_tensors` into a module of the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankopt.errors import ArtifactError

_ALIASES = "aliases"  # metadata: JSON of name → the name that the same tensor is stored under


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


def read_tensors(path: Path, module: nn.Module) -> None:
    """Fill `module` in place with the values of a file that `write_tensors` wrote.

    Raises `ArtifactError` when the file is damaged, or an entry is missing, unexpected, or of another shape or dtype;
    `module` is then unchanged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            aliases = _aliases(file.metadata(), path)
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or _first_line(error)}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: is damaged: {_first_line(error)}") from None
    expected = module.state_dict()
    values = {}
    for name, wanted in expected.items():
        found = tensors.get(aliases.get(name, name))
        if found is None:
            raise ArtifactError(f"{path}: lacks {name}; it was saved from another model or plan")
        _check_entry(path, name, wanted, found)
        values[name] = found
    unexpected = [name for name in [*tensors, *aliases] if name not in expected]
    if unexpected:
        raise ArtifactError(f"{path}: holds {unexpected[0]}, which the model does not have")
    try:
        module.load_state_dict(values)
    except RuntimeError as error:  # a module with a loading of its own
        raise ArtifactError(f"{path}: {' '.join(str(error).split())}") from error


def _check_entry(path: Path, name: str, wanted: Any, found: Tensor) -> None:
    if not isinstance(wanted, Tensor):
        raise ArtifactError(f"{name}: the model keeps a {type(wanted).__name__} there, which no tensor can fill")
    if wanted.is_meta:
        raise ArtifactError(f"{name}: is on the meta device; give a dense model on a device that holds values")
    for what, need, got in (("shape", tuple(wanted.shape), tuple(found.shape)), ("dtype", wanted.dtype, found.dtype)):
        if need != got:
            raise ArtifactError(f"{path}: {name} needs the {what} {need}, got {got}")


def _aliases(metadata: Any, path: Path) -> dict[str, str]:
    try:
        aliases = json.loads((metadata or {}).get(_ALIASES, "{}"))
    except (ValueError, RecursionError):
        aliases = None
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise ArtifactError(f"{path}: is damaged: its table of shared tensors can't be read")
    return aliases


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
