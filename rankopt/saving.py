"""`saved`: build an entry, write it, and measure what was written. `memory_beside`: peak memory of two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt import artifact
from rankopt.exporting import check_formats
from rankopt.layers import as_call
from rankopt.peak_memory import MemoryTarget
from rankopt.targets import make
from rankopt.targets.target import Subject, Target

if TYPE_CHECKING:
    from torch import nn

    from rankopt.result import Entry
    from rankopt.search import Search

_DEVICE = ("latency", "peak_memory", "memory")  # how the names of what was measured on a target begin


def memory_target(targets: Sequence[Target]) -> Target:
    """Where memory is measured: the first of the targets that measures it on this machine, else torch."""
    return next((t for t in targets if isinstance(t, MemoryTarget) and t.device == "cpu"), make("torch"))


def memory_beside(
    target: Target, dense: nn.Module, small: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Peak memory of inference of two models, as ``{"dense": {...}, "compressed": {...}}``."""
    mib = [target.peak_memory(Subject(module.eval(), *call)).value for module in (dense, small)]
    found = [{"peak_memory_mib": value, "memory_kept": value / mib[0]} for value in mib]
    return {"dense": found[0], "compressed": found[1]}


def saved(
    search: Search, entry: Entry, directory: Path, force: bool, exports: Sequence[str] = (), memory: bool = False
) -> dict[str, Any]:
    """See `Search.save`. Latency is as the study recorded it, and memory too, unless `memory` asks for it."""
    check_formats(exports)
    built = search.build(entry.plan, bn=bool(entry.notes.get("bn", 0)))
    costs = search.evaluator.costs(entry.plan)
    device = {k: v for k, v in entry.measurements.items() if k.startswith(_DEVICE)}
    compressed: dict[str, Any] = {**costs, **search.measure(built), **device}
    dense: dict[str, Any] = dict(search.evaluator.dense)
    measurements: dict[str, Any] = {"dense": dense, "compressed": compressed}
    if search.recorded is None and device:  # a plan of the user's, measured just now
        measurements |= {"conditions": search.devices.conditions, "notes": search.notes()}
    elif search.recorded is not None and device:
        dense |= {k: v for k, v in search.recorded.dense.items() if k.startswith(_DEVICE)}
        measurements |= {"conditions": search.recorded.conditions, "notes": list(search.recorded.notes)}
    if search.tests is not None:
        measurements["dense_test"] = search.measure(search.model, "test")
        measurements["compressed_test"] = search.measure(built, "test")
    call = as_call(search.example, search.example_kwargs)
    if memory and "peak_memory_mib" not in device:
        target = memory_target(search.targets)
        held = memory_beside(target, search.model, built, call)
        device |= held["compressed"]
        dense |= held["dense"]
        compressed |= held["compressed"]
        conditions = dict(measurements.get("conditions") or {})
        measurements |= {"conditions": conditions | {target.called: target.conditions()}, "memory_on": target.called}
    artifact.save(
        directory,
        built,
        entry.plan,
        measurements=measurements,
        source=search.source,
        force=force,
        exports=exports,
        example=call,
    )
    loaded = artifact.load(directory, search.model)
    test = {**costs, **search.measure(loaded, "test")} if search.tests is not None else None
    return {"validation": {**costs, **search.measure(loaded), **device}, "test": test}
