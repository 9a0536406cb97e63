"""A `Comparison` as rows for programs, tables for people, pictures, and the files of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from rankopt.chart import Chart, Rule, Series, colour_of
from rankopt.charts import title_of
from rankopt.comparison import MIXED, Comparison, Row
from rankopt.errors import InputError
from rankopt.model_card import environment, plain
from rankopt.tables import quantity
from rankopt.trial_table import write_rows
from rankopt.whole_file import replacing

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile

PLOT = "compare.svg"
FILES = ("compare.md", "compare.csv", "compare.json")
_COLUMNS = {
    "accuracy": "accuracy",
    "kl": "kl",
    "test_accuracy": "test",
    "trained_accuracy": "trained",
    "trained_kl": "kl trained",
    "trained_test_accuracy": "test trained",
    "macs_kept": "MACs",
    "params_kept": "params",
    "latency_kept": "time",
}
_SYMBOLS = ("circle", "open", "cross")


def flat(found: Comparison) -> list[dict[str, Any]]:
    """A row of plain values for every row; all have the same columns, and None where there is nothing."""
    keys = list(dict.fromkeys(key for row in found.rows for key in row.values))
    rows = []
    for row in found.rows:
        methods = "" if row.plan is None else ", ".join(f"{n} {c}" for n, c in row.plan.methods().items())
        rows.append(
            {"by": row.by, "level": row.level, "method": row.method, "missing": row.missing or None}
            | {"plan": None if row.plan is None else row.plan.digest, "layers_per_method": methods or None}
            | {key: plain(row.values.get(key)) for key in keys}
        )
    return rows


def as_dict(found: Comparison) -> dict[str, Any]:
    """All of it for JSON: rows with their plans, the dense model, how often mixed plans chose each method."""
    rows = flat(found)
    for values, row in zip(rows, found.rows, strict=True):
        values["plan"] = None if row.plan is None else row.plan.to_dict()
    return {
        "rows": rows, "dense": plain(found.dense), "chosen": dict(found.chosen), "never": found.never,
        "mixed_plans": found.mixed, "notes": list(found.notes), "conditions": plain(found.conditions),
    }  # fmt: skip


def columns_of(found: Comparison) -> list[str]:
    """The measurements that tables show, as far as there are any."""
    return [key for key in _COLUMNS if any(key in row.values for row in found.rows)]


def tables(found: Comparison) -> list[Table]:
    """A table for each quantity, within 80 columns as far as that is possible; the best of each level first.

    What no plan reaches has no row; `Comparison.notes` says so.
    """
    out = []
    keys = [k for k in columns_of(found) if k not in ("trained_kl", "trained_test_accuracy")]
    for by in dict.fromkeys(row.by for row in found.rows):
        if not ranked(found, by):
            continue
        table = Table(box=None, pad_edge=False, header_style="bold", title=f"at equal {by}", title_justify="left")
        table.add_column("level", justify="right", no_wrap=True)
        table.add_column("method", overflow="fold", min_width=15)
        for key in keys:
            table.add_column(_COLUMNS[key], justify="right", no_wrap=True)
        table.add_row("", "dense", *(shown(key, _dense(found, key)) for key in keys), style="dim")
        for row in ranked(found, by):
            style = "bold" if row.method == MIXED else ""
            table.add_row(
                f"{row.level:.0%}", row.method, *(shown(key, row.values.get(key)) for key in keys), style=style
            )
        out.append(table)
    return out


def sentences(found: Comparison) -> list[str]:
    """What the mixed plans chose, and what they never did."""
    plans = f"{found.mixed} mixed plan{'s' if found.mixed != 1 else ''}"
    used = sorted(((n, c) for n, c in found.chosen.items() if c), key=lambda pair: (-pair[1], pair[0]))
    lines = [f"layers per method in {plans}: {', '.join(f'{n} {c}' for n, c in used) or 'none'}"]
    lines += [f"never chosen by the mixed search: {name}" for name in found.never]
    return lines


def ranked(found: Comparison, by: str) -> list[Row]:
    """The plans of a quantity: level by level from the highest, the best first. Why some are missing, notes say."""
    rows = [row for row in found.rows if row.by == by and row.plan is not None]
    return sorted(rows, key=lambda row: (-row.level, *_badness(row)))


def markdown(found: Comparison, title: str, head: Sequence[str] = ()) -> str:
    """The whole as a record."""
    keys = columns_of(found)
    lines = [f"# {title}", "", *head]
    for by in dict.fromkeys(row.by for row in found.rows):
        lines += [f"## At equal {by}", ""]
        if not ranked(found, by):
            lines += ["No method reaches this; see the notes.", ""]
            continue
        lines += [f"| level | method | {' | '.join(_COLUMNS[key] for key in keys)} |"]
        lines += ["|---|---|" + "---|" * len(keys)]
        lines += [f"| | dense | {' | '.join(shown(key, _dense(found, key)) for key in keys)} |"]
        for row in ranked(found, by):
            cells = [shown(key, row.values.get(key)) for key in keys]
            lines.append(f"| {row.level:.0%} | {row.method} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What the mixed search chose", "", *(f"- {line}" for line in sentences(found)), ""]
    if found.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in found.notes), ""]
    for label, conditions in found.conditions.items():
        lines += [f"Conditions of {label}: {', '.join(f'{k} {v}' for k, v in conditions.items())}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def charts_of(found: Comparison) -> list[Chart]:
    """For each quantity, kl and accuracy against the share that was kept, a line a method; after recovery too."""
    charts = []
    for by in dict.fromkeys(row.by for row in found.rows):
        for key in ("kl", "accuracy", "trained_kl", "trained_accuracy"):
            if any(key in row.values for row in found.rows):
                before = "trained_" if key.startswith("trained_") else ""
                charts.append(_chart(found, by, key.removeprefix("trained_"), before))
    return charts


def write(found: Comparison, out: Path, title: str, head: Sequence[str] = ()) -> list[str]:
    """Write the tables, and the picture where Matplotlib is installed, into a folder; returns what was written.

    Where no plan reaches any level there is no picture. Each file appears complete or not at all, and takes the place
    of one of its name. Raises `InputError` where `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / FILES[0]) as part:
        part.write_text(markdown(found, title, head), encoding="utf-8")
    write_rows(flat(found), out / FILES[1])
    with replacing(out / FILES[2]) as part:
        part.write_text(json.dumps(as_dict(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    charts = charts_of(found)
    if not charts:
        return list(FILES)
    from rankopt import plots

    try:
        plots.draw(charts, out / PLOT, width=4.2)
    except InputError as error:
        if "Matplotlib" not in error.message:
            raise
        return list(FILES)
    return [*FILES, PLOT]


def head_of(file: StudyFile, command: str) -> list[str]:
    """How the record of a study's comparison begins."""
    versions = ", ".join(f"{k} {v}" for k, v in environment().items() if k != "platform")
    described = [file.description, ""] if file.description else []
    return [*described, "```", command, "```", "", f"{versions}.", ""]


def _chart(found: Comparison, by: str, quality: str, before: str) -> Chart:
    cost = f"{by.partition('@')[0]}_kept" + (f"@{label}" if (label := by.partition("@")[2]) else "")
    key, series = f"{before}{quality}", []
    names = dict.fromkeys(row.method for row in found.rows if row.method != MIXED)
    for number, name in enumerate([*names, MIXED]):
        own = [r for r in found.rows if r.by == by and r.method == name and key in r.values and cost in r.values]
        own.sort(key=lambda row: row.values[cost])
        if own:
            xs, ys = [100 * r.values[cost] for r in own], [r.values[key] for r in own]
            texts = [f"{name} at {r.level:.0%}\n{quality} {y:.4g}" for r, y in zip(own, ys, strict=True)]
            symbol = "star" if name == MIXED else _SYMBOLS[number % len(_SYMBOLS)]
            colour = "#000000" if name == MIXED else colour_of(name)
            kind: Literal["points", "line"] = "points" if name == MIXED else "line"  # it often is another one's plan
            series.append(Series(kind, name, xs, ys, colour, texts, symbol=symbol))
    dense = found.dense.get(quality) if quality == "accuracy" else None
    rules = [Rule("y", dense, "dense")] if dense is not None else []
    what = f"{'latency' if by.startswith('latency') else by}, % of dense"
    head = f"{quality} at equal {by}" + (" after recovery" if before else "")
    values = [y for one in series for y in one.y if isinstance(y, float)]
    logarithmic = ["y"] if quality == "kl" and values and min(values) > 0 and max(values) > 20 * min(values) else []
    empty = "" if series else "nothing was measured"
    return Chart(f"compare {key} {by}", head, what, title_of(quality), series, rules, logarithmic, empty=empty)


def shown(key: str, value: float | None) -> str:
    """A measurement as it is shown, whatever it was measured on and when."""
    return quantity(key.removeprefix("trained_").removeprefix("test_"), value)


def _badness(row: Row) -> tuple[float, ...]:
    values = row.values
    for key, sign in (("trained_accuracy", -1), ("trained_kl", 1), ("accuracy", -1), ("kl", 1)):
        if key in values:
            return sign * values[key], values.get("kl", 0.0)
    return (0.0,)


def _dense(found: Comparison, key: str) -> float | None:
    if key.endswith("_kept"):
        return 1.0
    plain_key = key.replace("trained_", "")
    return 0.0 if plain_key.endswith("kl") else found.dense.get(plain_key)
