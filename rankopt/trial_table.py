"""All trials of a study as rows: for CSV, Parquet, JSON and pandas."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import InputError
from rankopt.whole_file import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from rankopt.history import History

FORMATS = ("csv", "parquet", "json")


def trial_rows(history: History) -> list[dict[str, Any]]:
    """A row of plain values for every trial; all have the same columns in the same order.

    ``trial``, ``state``, ``within_limits``, ``front``, ``reason``, ``begun`` (local time), ``seconds``, ``same_as``,
    all that was measured, ``predicted_kl``, ``plan`` (its digest), ``param.NAME`` for what was proposed, ``layer.NAME``
    for what was chosen, ``environment.NAME`` for seed, machine and versions. What a trial does not have is None.
    """
    on_front = {e.trial for e in history.result.front}
    measured = _keys(t.measurements for t in history.trials)
    params = _keys(t.params for t in history.trials)
    layers = _keys(t.plan.layers for t in history.trials if t.plan is not None)
    environment = _keys(t.environment for t in history.trials)
    rows = []
    for trial in history.trials:
        row: dict[str, Any] = {
            "trial": trial.number,
            "state": trial.state,
            "within_limits": trial.feasible,
            "front": trial.number in on_front,
            "reason": trial.reason,
            "begun": None if trial.begun is None else trial.begun.isoformat(timespec="milliseconds"),
            "seconds": trial.seconds,
            "same_as": trial.same_as,
        }
        row |= {key: trial.measurements.get(key) for key in measured}
        row |= {"predicted_kl": trial.predicted_kl, "plan": trial.plan.digest if trial.plan else None}
        row |= {f"param.{name}": trial.params.get(name) for name in params}
        row |= {f"layer.{name}": None if trial.plan is None else str(trial.plan[name]) for name in layers}
        row |= {f"environment.{name}": trial.environment.get(name) for name in environment}
        rows.append(row)
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write rows to a .csv, .parquet or .json file, complete or not at all.

    Raises:
        InputError: the file has another ending, or what writes it is not installed.
    """
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{out}: a table ends in .{', .'.join(FORMATS)}, got {out.suffix or 'no ending'!r}")
    write = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[suffix]
    with replacing(out) as part:
        write(rows, part)


def to_pandas(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a `pandas.DataFrame`; raises `InputError` where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise InputError("trials: needs pandas; install it with: pip install 'rankopt[report]'") from None
    return pd.DataFrame.from_records(list(rows))


def trials_table(history: History) -> Table:
    """All trials for people, within 80 columns."""
    from rich.table import Table

    from rankopt.tables import quantity

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    values = [t.measurements for t in history.trials]
    heads = {"accuracy": "accuracy", "kl": "kl", "macs_kept": "MACs", "latency_kept": "latency"}
    shown = [key for key in heads if any(v.get(key) is not None for v in values)]
    for key in shown:
        table.add_column(heads[key], justify="right", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("limits", no_wrap=True)
    table.add_column("why", overflow="fold")
    for trial in history.trials:
        kept = "" if trial.feasible is None else "kept" if trial.feasible else "no"
        why = trial.reason or ("" if trial.same_as is None else f"the plan of trial {trial.same_as}")
        cells = [quantity(key, trial.measurements.get(key)) for key in shown]
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        style = "" if trial.feasible else "dim"
        table.add_row(str(trial.number), trial.state, *cells, seconds, kept, why, style=style)
    return table


def _keys(mappings: Any) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["trial"])
        writer.writeheader()
        writer.writerows(rows)


def _write_json(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    try:
        to_pandas(rows).to_parquet(path, index=False)
    except ImportError:
        raise InputError(f"{path.suffix}: needs pyarrow; install it with: pip install 'rankopt[report]'") from None
