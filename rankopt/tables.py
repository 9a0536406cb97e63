"""What the command line shows: rows for JSON, and tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rankopt.result import told

if TYPE_CHECKING:
    from rankopt.layer_spec import LayerSpec
    from rankopt.space_file import LayerSpace

MEASURED = ("accuracy", "kl", "macs_kept", "params_kept", "latency_ms", "latency_kept")
_DEVICE = ("latency", "peak_memory", "memory")
_HEADS = {
    "accuracy": "accuracy",
    "kl": "kl",
    "macs_kept": "MACs kept",
    "params_kept": "params kept",
    "latency_ms": "ms",
    "latency_kept": "ms kept",
}


def front_row(entry: Any) -> dict[str, Any]:
    """One entry of a result as JSON; what was not measured is null."""
    values = entry.measurements
    row = {"trial": entry.trial, **{key: values.get(key) for key in MEASURED}}
    row |= {k: v for k, v in values.items() if k.startswith(_DEVICE) and k not in row and told(k, values)}
    return row | {"feasible": bool(entry.feasible), "methods": entry.plan.methods()}


def front_table(
    rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float] | None = None, best: int | None = None
) -> Table:
    """Rows of `front_row` below the dense model; quantities that no row has are left out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right", no_wrap=True)
    shown = [key for key in MEASURED if any(row.get(key) is not None for row in rows)]
    if "latency_ms" in shown and "params_kept" in shown:
        shown.remove("params_kept")  # it would not fit 80 columns
    shown += dict.fromkeys(key for row in rows for key in row if key.startswith("latency_ms@"))
    for key in shown:
        table.add_column(_HEADS.get(key, key.replace("latency_ms", "ms")), justify="right", no_wrap=True)
    table.add_column("limits", no_wrap=True)
    table.add_column("layers per method", overflow="fold")
    if dense:
        full = {**dense, "macs_kept": 1.0, "params_kept": 1.0, "kl": 0.0}
        if full.get("latency_ms") is not None:
            full["latency_kept"] = 1.0
        table.add_row("dense", *(quantity(key, full.get(key)) for key in shown), "", "", style="dim")
    for row in rows:
        methods = ", ".join(f"{name} {n}" for name, n in row["methods"].items())
        chosen = best is not None and row["trial"] == best
        kept = "best" if chosen else "kept" if row["feasible"] else "no"
        table.add_row(
            str(row["trial"]),
            *(quantity(key, row.get(key)) for key in shown),
            kept,
            methods,
            style="bold" if chosen else "" if row["feasible"] else "dim",
        )
    return table


def offered(layer: LayerSpec, space: LayerSpace | None) -> tuple[list[str], str | None]:
    """The methods that a layer really has (None: it is not in the space), and else why it stays as it is."""
    from rankopt.decompositions import table

    if space is None or space.dense:
        return [], layer.skip or "the search space leaves it dense"
    reasons = {name: table()[name].why_not(layer) for name in space.methods}
    fitting = [name for name, why in reasons.items() if why is None]
    fitting += [entry["method"] for entry in space.explicit if entry["method"] not in fitting]
    if fitting:
        return fitting, None
    return [], "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "the search space offers no method"


def layer_row(layer: LayerSpec, total: int, methods: Sequence[str], reason: str | None) -> dict[str, Any]:
    """One layer as JSON: shapes, costs, the methods that the study offers it, and why it is left alone."""
    return {
        "name": layer.name,
        "kind": layer.kind,
        "weight_shape": list(layer.weight_shape),
        "groups": layer.groups,
        "macs": layer.macs,
        "macs_share": layer.macs / total if total else 0.0,
        "params": layer.params,
        "methods": list(methods),
        "left_alone": reason,
        "aliases": list(layer.aliases),
    }


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `layer_row` without the methods and reasons, which may be long."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("weight", no_wrap=True)
    for head in ("MACs", "share", "params"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shape = "×".join(map(str, row["weight_shape"])) + (f" /{row['groups']}" if row["groups"] > 1 else "")
        table.add_row(
            row["name"],
            row["kind"],
            shape,
            compact(row["macs"]),
            f"{row['macs_share']:.1%}",
            compact(row["params"]),
            style="dim" if row["left_alone"] else "",
        )
    return table


def measured_table(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Measurements side by side, one column each, e.g. dense and compressed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    keys = list(dict.fromkeys(key for values in columns.values() for key in values))
    for key in keys:
        if not told(key, keys):
            continue
        if any(isinstance(values.get(key), int | float) for values in columns.values()):
            table.add_row(key, *(quantity(key, values.get(key)) for values in columns.values()))
    return table


def quantity(key: str, value: Any) -> str:
    """A measured value as it is shown."""
    if not isinstance(value, int | float):
        return "–"
    if "_kept" in key:
        return f"{value:.1%}"
    if key in ("macs", "params"):
        return compact(value)
    if key.startswith("kl"):
        return f"{value:.4f}"
    return f"{value:.3f}" if "_ms" in key else f"{value:.2f}"


def compact(value: float) -> str:
    """A count with three digits and K, M, G: 1180000 is 1.18M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= 0.9995 * size:  # from here on three digits round up to the next unit
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"
