"""`load_callable`: from ``package.module:callable`` or ``file.py:callable`` in a study file to the object."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rankopt.errors import RankoptError, StudyFileError
from rankopt.yaml_file import closest


def check_spec(spec: object) -> str:
    """Return the text when it has the form of a callable's address; raises ValueError (for pydantic) otherwise."""
    if isinstance(spec, str):
        place, _, name = spec.rpartition(":")
        if place.strip() and name and all(part.isidentifier() for part in name.split(".")):
            return spec
    raise ValueError(f"needs 'package.module:callable' or 'file.py:callable', got {spec!r}")


def load_callable(spec: str, base_dir: Path, label: str = "") -> Callable[..., Any]:
    """Import what `spec` names; a file is looked up beside the study file.

    Raises `StudyFileError`, one line that begins with `label`, when the file or attribute is missing, when the import
    raises, or when the object can't be called.
    """
    try:
        check_spec(spec)
    except ValueError as error:
        raise StudyFileError(f"{label}{error}") from None
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = (base_dir / Path(place).expanduser()).resolve()
        if not path.is_file():
            raise StudyFileError(f"{label}{spec!r}: there is no file {path}")
        module = _guarded(lambda: _import_file(path), base_dir, f"{label}{spec!r}")
    else:
        module = _guarded(lambda: importlib.import_module(place), base_dir, f"{label}{spec!r}")
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            near = closest(part, names) if len(names) <= 12 or closest(part, names).startswith("; did") else ""
            raise StudyFileError(f"{label}{spec!r}: {place} has no {part!r}{near}")
        found = getattr(found, part)
    if not callable(found):
        raise StudyFileError(f"{label}{spec!r}: {name} can't be called, it is of type {type(found).__name__}")
    return found


def call(function: Callable[..., Any], args: Mapping[str, Any], label: str) -> Any:
    """Call with keyword arguments; whatever it raises becomes one line. Errors of rankopt's own pass as they are."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        pass  # builtins tell nothing about themselves
    else:
        try:
            signature.bind(**args)
        except TypeError as error:
            raise StudyFileError(f"{label}args: {error}") from None
    try:
        return function(**args)
    except RankoptError:
        raise
    except (Exception, SystemExit) as error:
        raise StudyFileError(f"{label}call: raised {_described(error)}") from error


def _import_file(path: Path) -> ModuleType:
    # One name a version of the file: model, data and metric of one study share the module, an edited file is read anew.
    key = hashlib.sha256(f"{path}\0{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"rankopt_study_{path.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, so that dataclasses and pickle find their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(load: Callable[[], ModuleType], base_dir: Path, label: str) -> ModuleType:
    try:
        with _importable(base_dir):
            return load()
    except (Exception, SystemExit) as error:
        raise StudyFileError(f"{label}: can't be imported: {_described(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules beside the study be imported; last on the path, so that they hide nothing that is installed."""
    entry = str(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(entry)  # the one appended above
        sys.path.reverse()


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
