"""`draw`: charts as SVG, PDF or PNG files for papers, by Matplotlib.

Matplotlib and not Plotly's own export, because that starts a Chrome, which servers and clusters seldom have; text stays
text in SVG and PDF, sizes are inches, and the same study gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.chart import LIMIT, Chart, Series
from rankopt.errors import InputError
from rankopt.whole_file import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "pdf", "png")
_MANY = 6  # names in a legend that find room between the marks
_MARKERS = {"circle": "o", "open": "o", "cross": "x", "star": "*", "ring": "o"}
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 7, "svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "rankopt",
}  # fmt: skip


def draw(charts: Sequence[Chart], out: Path, width: float = 3.4, dpi: int = 300) -> None:
    """Draw charts beside each other into one file, complete or not at all.

    Args:
        charts: at most two stand in a row.
        out: ends in .svg, .pdf or .png.
        width: of one chart, in inches; 3.4 is a column of most papers.
        dpi: of PNG.

    Raises:
        InputError: Matplotlib is not installed, the ending is another one, there is nothing to draw, or the file
            can't be written.
    """
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"{out}: a plot ends in .{', .'.join(FORMATS)}, got {out.suffix or 'no ending'!r}")
    drawn = [chart for chart in charts if not chart.empty]
    if not drawn:
        raise InputError(f"{charts[0].title}: {charts[0].empty}" if charts else "plot: there is nothing to draw")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot: needs Matplotlib; install it with: pip install 'rankopt[plots]'") from None
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    height = max(_height(chart) for chart in drawn)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        for number, chart in enumerate(drawn):
            _draw(chart, figure.add_subplot(rows, columns, number + 1), titled=len(drawn) > 1)
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        with replacing(out) as part:
            figure.savefig(part, format=suffix, dpi=dpi, metadata=metadata)


def _height(chart: Chart) -> float:
    return max(1.4, 0.9 + 0.16 * len(chart.categories)) if chart.categories else 2.6


def _draw(chart: Chart, axes: Axes, titled: bool) -> None:
    from matplotlib.ticker import EngFormatter

    places = {name: number for number, name in enumerate(chart.categories)}
    for series in chart.series:
        _series(series, axes, places)
    for axis in chart.logarithmic:
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    for rule in chart.rules:
        if rule.axis == "xy":
            low = max(axes.get_xlim()[0], axes.get_ylim()[0])
            axes.axline((low, low), (low * 2 or 1.0, low * 2 or 1.0), color="0.6", linewidth=0.8, zorder=0)
            continue
        line, at = (axes.axvline, (rule.at, 1.0)) if rule.axis == "x" else (axes.axhline, (1.0, rule.at))
        line(rule.at, color=LIMIT, linestyle="--", linewidth=0.8, zorder=0)
        transform = axes.get_xaxis_transform() if rule.axis == "x" else axes.get_yaxis_transform()
        axes.annotate(
            _plain(rule.label), at, xycoords=transform, xytext=(2, 2), textcoords="offset points", fontsize=6,
            color=LIMIT, ha="right" if rule.axis == "y" else "left", annotation_clip=False,
        )  # fmt: skip
    if places:
        axes.set_yticks(list(places.values()), [_plain(_short(name)) for name in places], fontsize=6)
        axes.set_ylim(len(places) - 0.4, -0.6)
        if axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, not 10000
    axes.set_xlabel(_plain(chart.x))
    axes.set_ylabel(_plain(chart.y))
    if titled:
        axes.set_title(_plain(chart.title), pad=18 if places and sum(bool(s.name) for s in chart.series) > 1 else 6)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        if places:  # bars reach everywhere: above them
            axes.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), borderpad=0)
        elif len(names) > _MANY:  # it would lie on what is drawn
            axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderpad=0)
        else:
            axes.legend(handles, names, loc="best")


def _series(series: Series, axes: Axes, places: dict[str, int]) -> None:
    nan = float("nan")
    xs = [nan if x is None else x for x in series.x]
    ys: list[Any] = [places[str(y)] for y in series.y] if places else [nan if y is None else y for y in series.y]
    name = _plain(series.name) or None
    if series.kind in ("bars", "back"):
        if all(math.isnan(x) for x in xs):
            return
        back = series.kind == "back"
        axes.barh(
            ys,
            xs,
            height=0.8 if back else 0.5,
            color=series.colour,
            alpha=0.3 if back else 1.0,
            label=name,
            linewidth=0,
        )
    elif series.kind == "steps":
        axes.step(xs, ys, where="post", color=series.colour, label=name, linewidth=1.2)
    elif series.sizes:
        if any(not math.isnan(x) for x in xs):
            axes.scatter(xs, ys, s=[(0.6 * s) ** 2 for s in series.sizes], color=series.colour, label=name, linewidth=0)
    else:
        hollow = series.symbol in ("open", "ring")
        axes.plot(
            xs, ys, marker=_MARKERS[series.symbol], linestyle="-" if series.kind == "line" else "none", linewidth=0.8,
            color=series.colour, markersize={"star": 9, "ring": 9}.get(series.symbol, 3.5), label=name,
            markerfacecolor="none" if hollow else series.colour,
        )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _plain(text: str) -> str:
    """Names of a study are not to be read as formulas."""
    return text.replace("$", r"\$")
