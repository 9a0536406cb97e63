"""`save` and `load`: a compressed model as a directory of JSON and safetensors that needs no pickle to be read.

::

    plan.json           what was decided for every layer, and the fingerprint of the dense model
    model.safetensors   all values of the compressed model
    measurements.json   what was measured, dense and compressed
    environment.json    where: versions and processor; and where the dense model's class is found
    README.md           a short model card
    model.onnx …        the exports that were asked for
    manifest.json       sizes and hashes of all of these; written last
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankopt.dense_source import PASS, check_source, dense_model, recorded_source
from rankopt.errors import ArtifactError, PlanError
from rankopt.exporting import write_exports
from rankopt.fresh_inputs import described
from rankopt.kinds import kind_of
from rankopt.layers import weights_digest
from rankopt.manifest import MANIFEST, SCHEMA, Manifest
from rankopt.model_card import environment, model_card, plain
from rankopt.plan import Plan
from rankopt.program_file import load_program
from rankopt.surgery import structure
from rankopt.tensor_file import read_tensors, write_tensors
from rankopt.untrusted import read_json, read_text

PLAN, TENSORS, MEASUREMENTS, ENVIRONMENT, CARD = (
    "plan.json",
    "model.safetensors",
    "measurements.json",
    "environment.json",
    "README.md",
)
_LARGEST_PLAN = 64 * 2**20


def save(
    directory: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    measurements: Mapping[str, Any],
    source: str | None = None,
    force: bool = False,
    exports: Sequence[str] = (),
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
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
        exports: further formats, see `rankopt.exporting.export`; they are checked before anything appears.
        example: the call (args, kwargs) that the exports are made with. Its shapes, dtypes and ranges are recorded, so
            that `verify` can make inputs like it; its values are not.

    Returns:
        The directory.

    Raises:
        ArtifactError: the directory exists, the model was not made by the plan, or it holds what can't be saved.
        InputError: an export fails; names the layer to blame.
    """
    target = Path(directory).resolve()
    if source is not None:
        check_source(source)
    _check_target(target, force)
    _check_made_by(model, plan)
    if exports and example is None:
        raise ArtifactError("exports: need an example input; pass example=(args, kwargs)")
    record = {"schema": SCHEMA, "source": source, **environment()}
    values = plain(measurements)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
        (beside / PLAN).write_text(plan.to_json(), encoding="utf-8")
        _write_json(beside / MEASUREMENTS, values)
        _write_json(beside / ENVIRONMENT, record)
        write_tensors(beside / TENSORS, model)
        shutil.copymode(beside / PLAN, beside / TENSORS)  # safetensors writes for the owner alone
        records = write_exports(model, (example[0], dict(example[1])), exports, beside) if example is not None else {}
        card = model_card(target.name, plan, values, record, records)
        (beside / CARD).write_text(card, encoding="utf-8")
        inputs = described(*example) if records and example is not None else None
        Manifest.of(beside, weights_digest(model), records, inputs).write(beside)
        _put(beside, target)
    except OSError as error:
        raise ArtifactError(f"{directory}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def load(
    directory: str | Path,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    standalone: bool = False,
) -> nn.Module:
    """Rebuild a saved model: exactly the saved values, in eval mode. Nothing is decomposed and nothing is unpickled.

    Args:
        directory: as written by `save`.
        model: the dense model (its weights may be any; it is not changed), or a callable that makes one, or
            ``package.module:callable``. None takes the source recorded in the artifact, if it names an nn.Module
            class or a function whose return annotation is one.
        standalone: load the exported program (``pt2``) instead, which needs no code but PyTorch's. It can be run, not
            trained; weights are float32 and folded, so outputs are equal within the export's tolerance.

    Raises:
        ArtifactError: a file is missing or damaged, or does not belong to this model; names the entry.
        PlanError: the model is another architecture than the plan was made for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: is not a directory; give one that holds {PLAN} and {TENSORS}")
    manifest = Manifest.read(directory)
    if standalone:
        if model is not None:
            raise ArtifactError(f"{directory}: a standalone program needs no model; leave model out")
        if "pt2" not in manifest.exports:
            raise ArtifactError(f"{directory}: holds no exported program; write it with --export pt2")
        return load_program(manifest.check(directory, manifest.exports["pt2"]["files"][0]))
    plan = read_plan(directory, manifest)
    if model is None:
        model = recorded(directory)
    tensors = manifest.check(directory, TENSORS)
    built = structure(dense_model(model, str(directory)), plan)
    read_tensors(tensors, built)
    return built.eval()


def read_plan(directory: Path, manifest: Manifest) -> Plan:
    """The plan of a saved model; raises `ArtifactError` when it is damaged."""
    path = manifest.check(directory, PLAN)
    try:
        return Plan.from_json(read_text(path, _LARGEST_PLAN), str(path))
    except PlanError as error:
        raise ArtifactError(error.message) from error


def read_measurements(directory: str | Path) -> dict[str, Any]:
    """The measurements that were saved with a model; raises `ArtifactError` when they can't be read."""
    return read_json(Path(directory) / MEASUREMENTS)


def recorded(directory: Path) -> Callable[[], nn.Module]:
    """The recorded source of the dense model as a callable, if it may be trusted to make a model.

    Raises:
        ArtifactError: none is recorded, or it is not what makes a model.
    """
    source = read_json(Manifest.read(directory).check(directory, ENVIRONMENT)).get("source")
    if source is None:
        raise ArtifactError(f"{directory}: records no source of the dense model; {PASS}")
    return recorded_source(source, str(directory / ENVIRONMENT))


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise ArtifactError(f"{target}: already exists; give another directory, or force to replace it")
    if not target.is_dir() or not ((target / PLAN).is_file() and (target / MANIFEST).is_file()):
        raise ArtifactError(f"{target}: holds no saved model, so force does not replace it; give another directory")


def _check_made_by(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, choice in plan.changed().items():
        if name not in modules or kind_of(modules[name]) is not None:
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
