"""The dense model that a saved one is rebuilt around: from a module, a callable, or an address that was recorded."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rankopt.errors import ArtifactError, RankoptError

_ADDRESS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
PASS = "pass model= (a module, or a callable that makes one; at the command line --study or --model)"


def check_source(source: Any, where: str = "source") -> str:
    """Return ``package.module:Name`` as it is; raise `ArtifactError` for anything else, above all a file's path."""
    if not isinstance(source, str) or not _ADDRESS.fullmatch(source):
        raise ArtifactError(f"{where}: needs package.module:Name, got {str(source)[:80]!r}; {PASS} when loading")
    return source


def source_of(address: str, args: Mapping[str, Any]) -> str | None:
    """The address of a study's model as it can be recorded: None for a file, a method, or one that takes arguments."""
    is_file = address.partition(":")[0].endswith(".py")
    return address if _ADDRESS.fullmatch(address) and not (args or is_file) else None


def dense_model(model: nn.Module | Callable[[], nn.Module] | str, where: str) -> nn.Module:
    """The dense model itself; a text is imported and a callable is called. Raises `ArtifactError`."""
    if isinstance(model, nn.Module):
        return model
    make = _imported(model, where) if isinstance(model, str) else model
    if isinstance(make, nn.Module):
        return make
    if not callable(make):
        raise ArtifactError(f"{where}: model must be a module or a callable that makes one, got {type(make).__name__}")
    try:
        made = make()
    except RankoptError:  # says by itself what is wrong
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactError(
            f"{where}: {_name(make)} did not make the dense model: {type(error).__name__}: {reason}; {PASS}"
        ) from error
    if not isinstance(made, nn.Module):
        raise ArtifactError(f"{where}: {_name(make)} must make a torch.nn.Module, got {type(made).__name__}")
    return made


def recorded_source(source: Any, where: str) -> Callable[[], nn.Module]:
    """The callable at an address that came with a file, not from the user.

    It is only called when it is an nn.Module class, or a function that says it returns one; any other function could
    do anything.
    """
    found = _imported(check_source(source, where), where)
    kind = found if inspect.isclass(found) else _returned(found) if inspect.isfunction(found) else None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise ArtifactError(
            f"{where}: {source} is neither an nn.Module class nor a function annotated to return one; {PASS}"
        )
    return found


def _imported(address: str, where: str) -> Any:
    place, _, name = check_source(address, where).partition(":")
    try:
        return getattr(importlib.import_module(place), name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ArtifactError(
            f"{where}: {address} can't be imported: {type(error).__name__}: {reason}; {PASS}"
        ) from error


def _returned(function: Any) -> Any:
    try:
        return typing.get_type_hints(function).get("return")
    except Exception:  # an annotation that names something that is not there
        return None


def _name(make: Any) -> str:
    return str(getattr(make, "__qualname__", type(make).__name__))
