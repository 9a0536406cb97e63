"""`export`: a module as files for other runtimes, each run on fresh inputs of several batch sizes and compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.errors import ArtifactError, InputError, RankoptError
from rankopt.exports import exporter
from rankopt.exports.exporter import Exporter, Run
from rankopt.fresh_inputs import described, fresh
from rankopt.layers import as_call, plain_attention
from rankopt.nest import mapped, tensors
from rankopt.targets.torch_cpu import first_line
from rankopt.traced import Call, Traced, culprit, plain_output, traced

TOLERANCE = 1e-4
BATCHES = (1, 3, 17)


def export(
    module: nn.Module,
    directory: str | Path,
    formats: Sequence[str],
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write a module for other runtimes. All files appear, each after it was checked, or none.

    Weights and floating inputs become float32. Batch norms are folded into convolutions, and pointwise layers that
    follow one another into one where that costs no more. The first dimension that all inputs share is the batch, which
    may be of any size in what is written; where a model can't be traced so, the file takes the example's size alone
    and the record says so.

    Args:
        module: in any mode; it is exported in eval mode and not changed.
        directory: is made; files that are there already are replaced with `force` only.
        formats: of ``onnx``, ``pt2``, ``openvino``, ``executorch``.
        example_input: a tensor, or the tuple of positional arguments.
        example_kwargs: keyword arguments of the call.
        tolerance: how far an output may be from the module's, as a share of the largest entry of that output.
        force: replace files.

    Returns:
        Format → ``{"files", "bytes", "macs", "batches", "tolerance", "difference", "checked_with", "folded", …}``:
        MACs of one call on the example input, batch sizes it was checked with, and the largest difference found.

    Raises:
        InputError: a format is unknown, its package is missing, the model can't be exported, or an export computes
            something else; names the layer to blame.
        ArtifactError: a file is there already, or can't be written.
    """
    folder = Path(directory)
    chosen = check_formats(formats)
    taken = next((name for one in chosen for name in one.files if (folder / name).exists()), None)
    if taken is not None and not force:
        raise ArtifactError(f"{folder / taken}: already exists; give another directory, or force to replace it")
    args, kwargs = as_call(example_input, example_kwargs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as between:
            records = write_exports(module, (args, kwargs), formats, Path(between), tolerance)
            for record in records.values():
                for name in record["files"]:
                    os.replace(Path(between) / name, folder / name)
    except OSError as error:
        raise ArtifactError(f"{directory}: can't be written: {error.strerror or error}") from error
    return records


def check_formats(formats: Sequence[str]) -> list[Exporter]:
    """The formats of these names; raises `InputError` where one is unknown or can't be written here."""
    chosen = [exporter(name) for name in dict.fromkeys(formats)]
    for one in chosen:
        missing = one.missing()
        if missing:
            raise InputError(f"export {one.name}: {missing}")
    return chosen


def write_exports(
    module: nn.Module, call: Call, formats: Sequence[str], folder: Path, tolerance: float = TOLERANCE
) -> dict[str, dict[str, Any]]:
    """See `export`; into a folder that holds none of the files."""
    chosen = check_formats(formats)
    if not chosen:
        return {}
    description = described(*call)
    model = traced_or_blamed(module, call)
    batches = BATCHES if model.batch is None else (model.batch,)
    records = {}
    for one in chosen:
        try:
            stated = one.write(model, folder)
            tried = [n for n in batches if n <= stated.get("largest_batch", n)]
            difference = largest_difference(one.run(folder), model.module, description, tried)
        except OSError:
            raise
        except Exception as error:
            raise InputError(f"export {one.name}: {_blame(one, model, tolerance)}{_reason(error)}") from error
        if not difference <= tolerance:
            raise InputError(
                f"export {one.name}: {_blame(one, model, tolerance)}computes something else: outputs differ by "
                f"{difference:.2g} of their largest entry, allowed is {tolerance:g}"
            )
        records[one.name] = {
            "files": list(one.files),
            "bytes": sum((folder / name).stat().st_size for name in one.files),
            "macs": model.macs,
            "dtype": "float32",
            "folded": dict(model.folds),
            "batches": tried,
            "any_batch": model.batch is None,
            **({"fixed_because": model.fixed_because} if model.batch is not None else {}),
            "tolerance": tolerance,
            "difference": difference,
            "checked_with": one.runtime(),
            **stated,
        }
    return records


def largest_difference(
    run: Run, module: nn.Module, description: Mapping[str, Any], batches: Sequence[int], seed: int = 1
) -> float:
    """The largest difference of an export from a float32 module on fresh inputs, as a share of the largest entry.

    Infinite where shapes, whole numbers or what is not finite differ.
    """
    worst = 0.0
    for batch in batches:
        args, kwargs = fresh(description, batch, seed + batch)
        call: Call = mapped((args, kwargs), lambda t: t.float() if t.is_floating_point() else t)
        with torch.no_grad(), plain_attention():
            expected = tensors(plain_output(module(*call[0], **call[1])))
        found = run(call)
        if len(found) != len(expected):
            raise ValueError(f"it has {len(found)} outputs, the model {len(expected)}")
        worst = max([worst, *(_distance(a, b) for a, b in zip(expected, found, strict=True))])
    return worst


def traced_or_blamed(module: nn.Module, call: Call) -> Traced:
    """`traced`; where that fails, the error names the innermost layer that can't be traced."""
    try:
        return traced(module, *call)
    except Exception as error:
        found = _culprit(module, call, lambda inner, given: _fault(lambda: traced(inner, *given)))
        raise InputError(f"export: {_named(module, found)}{_reason(error)}") from error


def _distance(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    a, b = expected.detach().double().cpu(), found.detach().double().cpu()
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    if not expected.is_floating_point():
        return 0.0 if bool(same.all()) else float("inf")
    if not bool((torch.isfinite(a) == torch.isfinite(b)).all()) or not bool(same[~torch.isfinite(a)].all()):
        return float("inf")
    known = torch.isfinite(a)
    largest = float(a[known].abs().max()) if bool(known.any()) else 0.0
    return float((a - b)[known].abs().max()) / max(largest, 1e-6) if bool(known.any()) else 0.0


def _blame(one: Exporter, model: Traced, tolerance: float) -> str:
    """The name of the innermost layer that can't be written alone, or computes something else then."""

    def fault(inner: nn.Module, call: Call) -> str | None:
        return _fault(lambda: _alone(one, inner, call, tolerance))

    found = _culprit(model.module, model.call, fault)
    return _named(model.module, found)


def _alone(one: Exporter, module: nn.Module, call: Call, tolerance: float) -> None:
    with tempfile.TemporaryDirectory(prefix="rankopt-") as folder:
        part = traced(module, *call)
        one.write(part, Path(folder))
        batches = (part.batch,) if part.batch is not None else BATCHES[1:2]
        difference = largest_difference(one.run(Path(folder)), part.module, described(*call), batches)
    if not difference <= tolerance:
        raise ValueError(f"outputs differ by {difference:.2g}")


def _fault(attempt: Any) -> str | None:
    try:
        attempt()
    except Exception as error:
        return first_line(error)
    return None


def _culprit(module: nn.Module, call: Call, fault: Any) -> tuple[str, str] | None:
    def of_tensors(inner: nn.Module, given: Call) -> str | None:
        """What takes objects of some class can't be exported alone, which says nothing about the whole."""
        try:
            described(*given)
        except RankoptError:
            return None
        return None if not tensors(given) else fault(inner, given)

    try:
        return culprit(module, call, of_tensors)
    except Exception:  # the model does not even run: what is said of the whole has to do
        return None


def _named(module: nn.Module, found: tuple[str, str] | None) -> str:
    if found is None:
        return f"{type(module).__name__}: "
    name = found[0].removeprefix("module.") if type(module).__name__ == "Plain" else found[0]
    return f"layer {name} ({type(module.get_submodule(found[0])).__name__}): "


def _reason(error: BaseException) -> str:
    """What an error says; that of rankopt's own as it is, of an exporter's page of advice the cause."""
    if isinstance(error, RankoptError):
        return error.message
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
