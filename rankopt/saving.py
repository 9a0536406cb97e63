"""`saved`: build an entry, write it, and measure what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt import artifact
from rankopt.exporting import check_formats
from rankopt.layers import as_call

if TYPE_CHECKING:
    from rankopt.result import Entry
    from rankopt.search import Search

_DEVICE = ("latency", "peak_memory", "memory")  # how the names of what was measured on a target begin


def saved(search: Search, entry: Entry, directory: Path, force: bool, exports: Sequence[str] = ()) -> dict[str, Any]:
    """See `Search.save`. Latency and memory are as the study recorded them; no target is needed here."""
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
    artifact.save(
        directory,
        built,
        entry.plan,
        measurements=measurements,
        source=search.source,
        force=force,
        exports=exports,
        example=as_call(search.example, search.example_kwargs),
    )
    loaded = artifact.load(directory, search.model)
    test = {**costs, **search.measure(loaded, "test")} if search.tests is not None else None
    return {"validation": {**costs, **search.measure(loaded), **device}, "test": test}
