"""Charts as Plotly figures. What a study says is escaped, since Plotly reads its texts as HTML."""

from __future__ import annotations

import json
import math
from html import escape as escape_all
from typing import TYPE_CHECKING, Any

from rankopt.chart import LIMIT, Chart, Rule, Series
from rankopt.errors import InputError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SYMBOLS = {"circle": "circle", "open": "circle-open", "cross": "x", "star": "star", "ring": "circle-open"}
_LONGEST = 30


def figure(chart: Chart) -> Figure:
    """The chart as a `plotly.graph_objects.Figure`, without a theme: the page gives the colours of its text.

    Raises `InputError` where Plotly is not installed.
    """
    try:
        from plotly import graph_objects as go
    except ImportError:
        raise InputError("report: needs Plotly; install it with: pip install 'rankopt[report]'") from None
    fig = go.Figure(layout={"template": "none"})
    named = sum(bool(s.name) for s in chart.series) > 1
    for series in chart.series:
        fig.add_trace(_trace(go, series, named))
    fig.update_layout(
        margin={"l": 56, "r": 12, "t": 12, "b": 44},
        height=max(200, 92 + 24 * len(chart.categories)) if chart.categories else 340,
        barmode="overlay", bargap=0.25, hovermode="closest", dragmode=False, showlegend=named,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "xanchor": "left", "font": {"size": 11},
                "itemsizing": "constant"},
        hoverlabel={"align": "left", "namelength": 0},
        xaxis=_axis(chart, "x"), yaxis=_axis(chart, "y"),
    )  # fmt: skip
    for rule in chart.rules:
        _add_rule(fig, rule, chart)
    return fig


def escape(text: str) -> str:
    """Text in which Plotly finds no markup; it turns ``&lt;`` and its like back, but not ``&quot;``."""
    return escape_all(text, quote=False)


def as_json(fig: Figure) -> dict[str, Any]:
    """Data and layout as plain values."""
    plain = json.loads(fig.to_json())
    return {"data": plain["data"], "layout": plain["layout"]}


def _axis(chart: Chart, name: str) -> dict[str, Any]:
    title = chart.x if name == "x" else chart.y
    axis: dict[str, Any] = {
        "title": {"text": escape(title), "font": {"size": 12}},
        "automargin": True,
        "zeroline": False,
    }
    if name in chart.logarithmic:
        values = [v for s in chart.series for v in getattr(s, name) if isinstance(v, int | float) and v > 0]
        axis |= {"type": "log", "tickmode": "array", **_ticks(min(values), max(values))}
    if chart.categories and name == "y":
        texts = [escape(n if len(n) <= _LONGEST else f"…{n[1 - _LONGEST :]}") for n in chart.categories]
        places = list(range(len(texts)))
        axis |= {"tickmode": "array", "tickvals": places, "ticktext": texts, "range": [len(texts) - 0.4, -0.6]}
        axis |= {"tickfont": {"size": 11}, "showgrid": False, "title": {"text": ""}}
    return axis


def _ticks(low: float, high: float) -> dict[str, Any]:
    """1, 2 and 5 of every power of ten; of many powers the ones alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if len(powers) < 5 else (1,))]
    return {"tickvals": found, "ticktext": [f"{value:g}" for value in found]}


def _trace(go: Any, series: Series, named: bool) -> Any:
    texts = [escape(text).replace("\n", "<br>") for text in series.texts]
    shared: dict[str, Any] = {
        "name": escape(series.name),
        "x": list(series.x),
        "showlegend": bool(series.name) and named,
        "hovertext": texts or None,
        "hoverinfo": "text" if texts else "skip",
        "customdata": list(series.trials) or None,
        "meta": series.kind,
    }
    if series.y and isinstance(series.y[0], str):  # categories are numbered from the top
        shared["y"] = list(range(len(series.y)))
    else:
        shared["y"] = list(series.y)
    if series.kind in ("bars", "back"):
        back = series.kind == "back"
        colour = _pale(series.colour) if back else series.colour  # not by opacity, which legends don't show
        marker = {"color": colour, "line": {"width": 0}}
        return go.Bar(**shared, orientation="h", marker=marker, width=0.8 if back else 0.5)
    mode = {"points": "markers", "line": "lines+markers", "steps": "lines"}[series.kind]
    size: Any = list(series.sizes) or {"ring": 17, "star": 13}.get(series.symbol, 8)
    marker = {"color": series.colour, "symbol": _SYMBOLS[series.symbol], "size": size}
    marker["line"] = {"width": 2.5 if series.symbol == "ring" else 1.2, "color": series.colour}
    line = {"color": series.colour, "width": 1.5, "shape": "hv" if series.kind == "steps" else "linear"}
    return go.Scatter(**shared, mode=mode, marker=marker, line=line, cliponaxis=False)


def _add_rule(fig: Figure, rule: Rule, chart: Chart) -> None:
    if rule.axis == "xy":
        values = [v for s in chart.series for v in (*s.x, *s.y) if isinstance(v, int | float)]
        low, high = min(values), max(values)
        line = {"color": "#8a8f98", "width": 1, "dash": "dot"}
        fig.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line, layer="below")
        return
    add = fig.add_vline if rule.axis == "x" else fig.add_hline
    at = {"x": rule.at} if rule.axis == "x" else {"y": rule.at}
    add(
        **at, line={"color": LIMIT, "width": 1.2, "dash": "dash"}, layer="below",
        annotation={"text": escape(rule.label), "font": {"size": 11}},  # in the colour of the page's text
        annotation_position="bottom left" if rule.axis == "x" else "bottom right",
    )  # fmt: skip
    if rule.axis in chart.logarithmic:  # there a line is placed by its value, but a text by its logarithm
        fig.layout.annotations[-1][rule.axis] = math.log10(rule.at)


def _pale(colour: str) -> str:
    """#rrggbb, most of it transparent."""
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"
