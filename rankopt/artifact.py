"""`save` and `load`: a compressed model as a directory of JSON and safetensors that needs no pickle to be read.

::

    plan.json           what was decided for every layer, and the fingerprint of the dense model
    model.safetensors   all values of the compressed model
    measurements.json   what was measured, dense and compressed
    environment.json    where: versions and processor; and where the dense model's class is found
    README.md           a short model card
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.dense_source import check_source, dense_model, recorded_source
from rankopt.errors import ArtifactError, PlanError, RankoptError
from rankopt.layers import KINDS
from rankopt.model_card import environment, model_card, plain
from rankopt.plan import Plan
from rankopt.surgery import structure
from rankopt.tensor_file import read_tensors, write_tensors

PLAN, TENSORS, MEASUREMENTS, ENVIRONMENT, CARD = (
    "plan.json",
    "model.safetensors",
    "measurements.json",
    "environment.json",
    "README.md",
)
SCHEMA = 1
_MAX_BYTES = 16 * 2**20


def save(
    directory: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    measurements: Mapping[str, Any],
    source: str | None = None,
    force: bool = False,
) -> Path:
    """Write a compressed model. The directory appears complete or not at all.

    Args:
        directory: must not exist, unless `force`; its parents are made.
        model: what ``apply(model, plan)`` gave, trained further or not.
        plan: the plan it was made by.
        measurements: ``{"dense": {quantity: value}, "compressed": {quantity: value}, …}``; a value is a number, a
            mapping with ``value`` and ``unit``, or an object with ``to_dict``. NaN is written as null.
        source: where the dense model's class, or a function that makes it, is found: ``package.module:Name``.
        force: replace a directory that holds a saved model.

    Returns:
        The directory.

    Raises:
        ArtifactError: the directory exists, the model was not made by the plan, or it holds what can't be saved.
    """
    target = Path(directory).resolve()
    if source is not None:
        check_source(source)
    _check_target(target, force)
    _check_made_by(model, plan)
    record = {"schema": SCHEMA, "source": source, **environment()}
    values = plain(measurements)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
        (beside / PLAN).write_text(plan.to_json(), encoding="utf-8")
        _write_json(beside / MEASUREMENTS, values)
        _write_json(beside / ENVIRONMENT, record)
        (beside / CARD).write_text(model_card(target.name, plan, values, record), encoding="utf-8")
        write_tensors(beside / TENSORS, model)
        _put(beside, target)
    except OSError as error:
        raise ArtifactError(f"{directory}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def load(directory: str | Path, model: nn.Module | Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Rebuild a saved model: exactly the saved values, in eval mode. Nothing is decomposed and nothing is unpickled.

    Args:
        directory: as written by `save`.
        model: the dense model (its weights may be any; it is not changed), or a callable that makes one, or
            ``package.module:callable``. None takes the source recorded in the artifact, if it names an nn.Module
            class or a function whose return annotation is one.

    Raises:
        ArtifactError: a file is missing or damaged, or does not belong to this model; names the entry.
        PlanError: the model is another architecture than the plan was made for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: is not a directory; give one that holds {PLAN} and {TENSORS}")
    try:
        plan = Plan.load(directory / PLAN)
    except PlanError as error:
        raise ArtifactError(error.message) from error
    if model is None:
        model = recorded(directory)
    built = structure(dense_model(model, str(directory)), plan)
    read_tensors(directory / TENSORS, built)
    return built.eval()


def read_measurements(directory: str | Path) -> dict[str, Any]:
    """The measurements that were saved with a model; raises `ArtifactError` when they can't be read."""
    return _read_json(Path(directory) / MEASUREMENTS)


def recorded(directory: Path) -> Callable[[], nn.Module]:
    """The recorded source of the dense model as a callable, if it may be trusted to make a model.

    Raises:
        ArtifactError: none is recorded, or it is not what makes a model.
    """
    source = _read_json(directory / ENVIRONMENT).get("source")
    if source is None:
        raise ArtifactError(f"{directory}: records no source of the dense model; pass model= (a module or a callable)")
    return recorded_source(source, str(directory / ENVIRONMENT))


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise ArtifactError(f"{target}: already exists; give another directory, or force to replace it")
    if not target.is_dir() or not ((target / PLAN).is_file() and (target / ENVIRONMENT).is_file()):
        raise ArtifactError(f"{target}: holds no saved model, so force does not replace it; give another directory")


def _check_made_by(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, choice in plan.changed().items():
        if name not in modules or type(modules[name]) in KINDS:
            raise ArtifactError(
                f"{name}: the plan says {choice}, but the model was not made by it; give apply's result"
            )


def _put(beside: Path, target: Path) -> None:
    """Move `beside` to `target`; what was there comes back if that fails."""
    if not target.exists():
        os.rename(beside, target)
        return
    old = beside.with_name(beside.name + ".old")
    os.rename(target, old)
    try:
        os.rename(beside, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ArtifactError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so it is not what save wrote")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror}") from None
    except RecursionError:
        raise ArtifactError(f"{path}: nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        if isinstance(error, RankoptError):
            raise
        raise ArtifactError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: needs an object, got {type(data).__name__}")
    return data
