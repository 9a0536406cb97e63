"""`saved`: build an entry, write it, and measure what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt import artifact

if TYPE_CHECKING:
    from rankopt.result import Entry
    from rankopt.search import Search


def saved(search: Search, entry: Entry, directory: Path, force: bool) -> dict[str, Any]:
    """See `Search.save`. Latency and memory are those that the entry was measured with."""
    built = search.build(entry.plan, bn=bool(entry.notes.get("bn", 0)))
    costs = search.evaluator.costs(entry.plan)
    device = {k: v for k, v in entry.measurements.items() if k.startswith(("latency", "peak_memory", "memory"))}
    compressed: dict[str, Any] = {**costs, **search.measure(built), **device}
    measurements: dict[str, Any] = {"dense": dict(search.evaluator.dense), "compressed": compressed}
    if search.targets:
        measurements["conditions"] = search.devices.conditions
    if search.tests is not None:
        measurements["dense_test"] = search.measure(search.model, "test")
        measurements["compressed_test"] = search.measure(built, "test")
    artifact.save(directory, built, entry.plan, measurements=measurements, source=search.source, force=force)
    loaded = artifact.load(directory, search.model)
    test = {**costs, **search.measure(loaded, "test")} if search.tests is not None else None
    return {"validation": {**costs, **search.measure(loaded), **device}, "test": test}
