"""`bench`: a dense model and its compressed forms side by side on targets: latency, and peak memory if wanted.

All models of a target run in turns, so that a drift of the machine hits all alike; see `rankopt.timing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankopt.errors import InputError
from rankopt.measurement import Measurement
from rankopt.nest import tensors, with_batch
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

DENSE = "dense"
EFFORT = Effort(seconds=0.5, rounds=11, error=0.01, longest=3, repeats=1)
_LITTLE = 0.5  # MiB: memory that differs by less from process to process is not called noisy


def bench(
    dense: nn.Module,
    compressed: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    targets: Sequence[Target],
    effort: Effort | None = None,
    memory: bool = False,
) -> list[dict[str, Any]]:
    """Measure the models on every target.

    Args:
        dense: what the others are compared with, in eval mode.
        compressed: name → model, likewise.
        args, kwargs: of a call; a target with a batch size of its own gets that many samples.
        targets: where; each is called by another name.
        effort: of the latency measurement (None: some seconds a model).
        memory: whether peak memory is measured too, by some processes a model.

    Returns:
        A row of plain values for every target and model, the dense one (``"dense"``) first: ``target``, ``model``;
        ``latency_ms`` (the median), ``latency_low_ms`` and ``latency_high_ms`` (quartiles), ``latency_p95_ms``,
        ``runs``; ``latency_kept`` (the ratio to dense), ``latency_kept_low``, ``latency_kept_high`` (its quartiles over
        rounds), ``speedup`` (1 / ``latency_kept``); ``memory_mib``, ``memory_kept`` (None when not measured);
        ``noisy`` (what is noisy, else None); ``conditions``.

    Raises:
        InputError: a target is not there, can't run a model or can't measure memory, or two have one name.
    """
    labels = [target.called for target in targets]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"targets: two are called {twice!r}; give one of them another label")
    if DENSE in compressed:
        raise InputError(f"models: a compressed one can't be called {DENSE!r}")
    models = {DENSE: dense, **compressed}
    for target in targets:  # what is not there is told before anything is measured
        target.conditions()
    inputs = [with_batch((args, dict(kwargs or {})), target.batch) for target in targets]
    subjects = [[Subject(m, given, named, name) for name, m in models.items()] for given, named in inputs]
    held_by = [
        [target.peak_memory(one) if memory else None for one in own]
        for target, own in zip(targets, subjects, strict=True)
    ]
    rows = []
    for target, call, own, memories in zip(targets, inputs, subjects, held_by, strict=True):
        latencies = target.measure(own, effort or EFFORT)
        shapes = ", ".join(f"{'x'.join(map(str, t.shape))} {str(t.dtype)[6:]}" for t in tensors(call))
        for name, latency, held in zip(models, latencies, memories, strict=True):
            kept = latency.value / latencies[0].value if latency.kept is None else latency.kept
            rows.append(
                {
                    "target": target.called,
                    "model": name,
                    "latency_ms": latency.value,
                    "latency_low_ms": latency.low,
                    "latency_high_ms": latency.high,
                    "latency_p95_ms": latency.p95,
                    "runs": latency.n,
                    "latency_kept": kept,
                    "latency_kept_low": latency.kept_low,
                    "latency_kept_high": latency.kept_high,
                    "speedup": 1 / kept,
                    "memory_mib": held.value if held else None,
                    "memory_kept": held.value / memories[0].value if held and memories[0] else None,
                    "noisy": _noise(latency, held),
                    "conditions": {**latency.conditions, "input": shapes},
                }
            )
    return rows


def _noise(latency: Measurement, memory: Measurement | None) -> str | None:
    parts = [latency.noise().removeprefix("noisy: ")] if latency.noisy else []
    if memory is not None and memory.noisy and memory.high - memory.low > _LITTLE:
        parts.append(f"memory is {memory.low:.1f} to {memory.high:.1f} MiB in the middle half of its processes")
    return "; ".join(parts) or None


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of one target. ± is half the distance of the quartiles, as a share of the median."""
    from rich.table import Table

    from rankopt.tables import quantity

    memory = any(row["memory_mib"] is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold", max_width=16)
    heads = ["ms", "±", "p95", "of dense", "±", "speedup", *(["MiB", "of dense"] if memory else [])]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{row['latency_ms']:.4g}",
            _around(row["latency_low_ms"], row["latency_high_ms"], row["latency_ms"]),
            f"{row['latency_p95_ms']:.4g}",
            quantity("latency_kept", row["latency_kept"]),
            _around(row["latency_kept_low"], row["latency_kept_high"], row["latency_kept"]),
            f"{row['speedup']:.2f}×",
        ]
        if memory:
            cells += [quantity("memory_mib", row["memory_mib"]), quantity("memory_kept", row["memory_kept"])]
        table.add_row(row["model"], *cells, style="dim" if row["model"] == DENSE else "")
    return table


def described(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Of one target's rows: its conditions in one line, and a line for every noisy record."""
    first = rows[0]
    conditions = {k: v for k, v in first["conditions"].items() if k not in ("target", "architecture", "system")}
    plain = ("device", "processor", "runtime", "dtype", "input")  # say themselves what they are
    texts = [value if key in plain else f"{key.replace('_', ' ')} {value}" for key, value in conditions.items()]
    notes = [f"noisy: {row['model']} on {row['target']}: {row['noisy']}" for row in rows if row["noisy"]]
    return f"{first['target']}: {', '.join(texts)}", notes


def _around(low: float | None, high: float | None, value: float) -> str:
    return "–" if low is None or high is None else f"{(high - low) / 2 / value:.1%}"
