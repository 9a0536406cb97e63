"""`write_report`: a study as one HTML page that needs no network.

Everything that comes from the study is escaped: text by Jinja's autoescaping, data as JSON without ``<``, the texts of
figures by `figures`. The page's Content-Security-Policy names its own scripts by their digests, so nothing else runs,
and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankopt import charts
from rankopt.chart import Chart, colour_of
from rankopt.errors import InputError
from rankopt.history import FRONT, History
from rankopt.layer_costs import LayerCosts
from rankopt.plan import DENSE
from rankopt.report.figures import as_json, figure
from rankopt.result import Entry
from rankopt.tables import compact, quantity
from rankopt.whole_file import replacing

_HERE = Path(__file__).parent
_COLUMNS = {
    "accuracy": "accuracy", "kl": "kl, nats", "macs_kept": "MACs kept",
    "params_kept": "parameters kept", "latency_ms": "latency, ms", "latency_kept": "latency kept",
    "peak_memory_mib": "peak memory, MiB",
}  # fmt: skip
_FAILED = 10  # reasons that are listed


@dataclass(frozen=True)
class Subject:
    """What the page is about besides the trials.

    Attributes:
        path: of the study file, for commands.
        title, description: for people.
        costs: of the layers (None: the model was not built).
        notes: what the reader should know of the page itself.
        options: that name this very study besides its file, for commands: ``--storage`` and ``--target``.
    """

    path: str
    title: str
    description: str = ""
    costs: LayerCosts | None = None
    notes: Sequence[str] = ()
    options: Sequence[str] = ()


def write_report(history: History, subject: Subject, out: Path) -> None:
    """Write the page.

    Raises:
        InputError: what it needs is not installed, or the file has another ending than .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report ends in .html, got {out.suffix or 'no ending'!r}")
    text = page(history, subject)
    with replacing(out) as part:
        part.write_text(text, encoding="utf-8")


def page(history: History, subject: Subject) -> str:
    """The whole page as text; raises `InputError` when Plotly or Jinja is not installed."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(f"report: needs {error.name}; install it with: pip install 'rankopt[report]'") from None
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts = [get_plotlyjs(), (_HERE / "page.js").read_text(encoding="utf-8")]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    groups = _groups(history, subject.costs)
    return environment.get_template("page.html.jinja").render(
        subject=subject,
        history=history,
        best=charts.best_of(history.result),
        facts=_facts(history),
        groups=groups,
        data=_script_json(_data(history, subject, groups)),
        rows=_rows(history, subject),
        dense=_dense_cells(history),
        columns=[_COLUMNS[key] for key in _columns(history)],
        conditions=history.result.conditions,
        failed=_failed(history),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        policy=f"default-src 'none'; script-src {' '.join(f'{chr(39)}sha256-{d}{chr(39)}' for d in digests)}; "
        "style-src 'unsafe-inline'; img-src data: blob:",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("rankopt"),
    )


@dataclass(frozen=True)
class Group:
    """Charts that stand beside each other under one heading; `quality` where the page shows one quality at a time."""

    name: str
    charts: Sequence[Chart]
    quality: str = ""


def _groups(history: History, costs: LayerCosts | None) -> dict[str, list[Group]]:
    """Section → its groups of charts."""
    result = history.result
    keys = charts.costs_of(result)
    fronts = [Group(q, [charts.front(result, key, q) for key in keys], q) for q in charts.qualities_of(result)]
    shown = _first_shown(history)
    layers: list[Chart] = []
    if costs is not None and shown is not None:
        wanted = ["params", "macs", *(f"latency@{label}" for label in costs.times), "rank"]
        layers = [charts.layers(costs, shown, q, _methods(history, costs)) for q in wanted]
    predicted = [charts.prediction(history, "kl")]
    predicted += [charts.prediction(history, key) for key in keys if key.startswith("latency_ms")]
    wants = [w for w in (FRONT, *result.objectives) if w in history.importances]
    return {
        "front": fronts,
        "layers": [Group("layers", layers)] if layers else [],
        "prediction": [Group("prediction", predicted)],
        "history": [Group("history", [charts.volumes(history)])],
        "importances": [Group("importances", [charts.importances(history, w) for w in wants or [FRONT]])],
    }


def _first_shown(history: History) -> Entry | None:
    """The plan whose layers the page shows at first: the best, else the first of the front, else any."""
    result = history.result
    measured = [e for e in result.entries if e.trial >= 0]
    return charts.best_of(result) or next(iter([*result.front, *measured]), None)


def _data(history: History, subject: Subject, groups: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    """What the page's script works with."""
    shown = _first_shown(history)
    figures = {c.key: as_json(figure(c)) for own in groups.values() for g in own for c in g.charts if not c.empty}
    entries = [e for e in history.result.entries if e.trial >= 0]
    methods = _methods(history, subject.costs) if subject.costs else []
    return {
        "figures": figures,
        "shown": None if shown is None else shown.trial,
        "plans": {e.trial: _plan(e, subject) for e in entries},
        "layers": _layers(entries, subject.costs),
        "methods": methods,
        "colours": {name: colour_of(name) for name in methods},
        "times": list(subject.costs.times) if subject.costs else [],
    }


def _plan(entry: Entry, subject: Subject) -> dict[str, Any]:
    """A plan for the script; its layers' choices as text, by name."""
    names = [la.name for la in subject.costs.layers] if subject.costs else list(entry.plan)
    return {
        "values": charts.told_values(entry),
        "kept": entry.feasible,
        "layers": [str(entry.plan[name]) for name in names],
        "command": _command(entry, subject),
    }


def _methods(history: History, costs: LayerCosts) -> list[str]:
    """The methods of all plans, dense first: one series each in the pictures of layers."""
    used = {c.method for e in history.result.entries for c in (e.plan[la.name] for la in costs.layers)}
    return ["dense", *sorted(used - {"dense"})]


def _layers(entries: Sequence[Entry], costs: LayerCosts | None) -> list[dict[str, Any]]:
    """Every layer with the costs of all choices that some plan made for it; without a model the names alone."""
    if costs is None:
        names = list(dict.fromkeys(name for e in entries for name in e.plan))
        return [{"name": name, "shape": "", "skip": None, "choices": {}} for name in names]
    found = []
    for layer in costs.layers:
        used = dict.fromkeys([DENSE, *(e.plan[layer.name] for e in entries)])
        choices = {}
        for choice in used:
            cost = costs.of(layer, choice)
            choices[str(choice)] = {
                "method": choice.method,
                "params": cost.params,
                "macs": cost.macs,
                **{f"latency@{label}": ms for label, ms in cost.latency.items()},
                "rank": 100 * cost.rank_share,
                "size": charts.marker_size(cost.rank),
            }
        found.append({"name": layer.name, "shape": layer.describe(), "skip": layer.skip, "choices": choices})
    return found


def _columns(history: History) -> list[str]:
    values = [e.measurements for e in history.result.front]
    return [key for key in _COLUMNS if any(v.get(key) is not None for v in values)]


def _rows(history: History, subject: Subject) -> list[dict[str, Any]]:
    best = charts.best_of(history.result)
    return [
        {
            "trial": entry.trial,
            "best": best is not None and entry.trial == best.trial,
            "kept": entry.feasible,
            "cells": _cells(entry.measurements, _columns(history)),
            "methods": ", ".join(f"{name} {n}" for name, n in entry.plan.methods().items()),
            "command": _command(entry, subject),
        }
        for entry in history.result.front
    ]


def _dense_cells(history: History) -> list[str]:
    dense = history.result.dense
    full = {**dense, "macs_kept": 1.0, "params_kept": 1.0, "kl": 0.0}
    if "latency_ms" in dense:
        full["latency_kept"] = 1.0
    return _cells(full, _columns(history))


def _cells(values: Mapping[str, float | None], keys: Sequence[str]) -> list[str]:
    """Values as the table shows them, accuracy with its standard error."""
    cells = {key: quantity(key, values.get(key)) for key in keys}
    error = values.get("accuracy_se")
    if "accuracy" in cells and error is not None:
        cells["accuracy"] += f" ± {error:.2f}"
    return list(cells.values())


def _command(entry: Entry, subject: Subject) -> str:
    options = ["--trial", str(entry.trial), "--out", f"trial-{entry.trial}"]
    return shlex.join(["rankopt", "export", subject.path, *subject.options, *options])


def _facts(history: History) -> list[tuple[str, str]]:
    """The first lines of the page: what was searched for, and how much of it was found."""
    result, states = history.result, [t.state for t in history.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    dense = result.dense
    parts = [
        f"{compact(dense[key])} {name}" for key, name in (("macs", "MACs"), ("params", "parameters")) if key in dense
    ]
    parts += [f"accuracy {dense['accuracy']:.2f}"] if "accuracy" in dense else []
    parts += [f"{v:.4g} ms on {k.partition('@')[2]}" for k, v in dense.items() if k.startswith("latency_ms@")]
    parts += [f"{dense['peak_memory_mib']:.4g} MiB of memory"] if "peak_memory_mib" in dense else []
    return [
        ("limits", ", ".join(map(str, result.limits)) or "none"),
        ("objectives", ", ".join(result.objectives)),
        ("trials", ", ".join(f"{n} {state}" for state, n in counts.items()) or "none"),
        ("dense model", ", ".join(parts) or "not measured"),
    ]


def _failed(history: History) -> list[str]:
    """Why trials failed, the most frequent reason first."""
    reasons = [t.reason for t in history.trials if t.state == "failed" and t.reason]
    counts = sorted(((reasons.count(r), r) for r in set(reasons)), reverse=True)
    return [f"{n} × {reason}" for n, reason in counts[:_FAILED]]


def _script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no text of it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
