"""`Chart`: a picture as plain values; `report.figures` draws it for a browser, `plots` for a paper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

GREY, LIMIT = "#8a8f98", "#d1383d"
# Okabe and Ito's colours, which colour-blind people tell apart, without the yellow that nobody sees on white.
_METHODS = {
    "dense": GREY,
    "svd": "#0072b2",
    "svd_in": "#56b4e9",
    "spatial_svd": "#009e73",
    "tucker2": "#e69f00",
    "tucker": "#9a6f00",
    "cp": "#cc79a7",
    "tensor_train": "#d55e00",
    "tensor_ring": "#7a5ea8",
    "svd_act": "#003f66",
    "spatial_svd_act": "#00523c",
    "tucker2_act": "#8c6200",
    "cp_act": "#8f3f6d",
    "relu_svd": "#4f6d8f",
    "relu_tucker": "#b5892b",
    "relu_cp": "#b06c8c",
    "sin_svd": "#2a9fa0",
}
_OTHERS = ("#4b7f52", "#b04a76", "#3f5fa8", "#8c5a3c", "#2f8f9d")


@dataclass(frozen=True)
class Series:
    """One kind of mark.

    Attributes:
        kind: "points", "line" (points connected in their order), "steps" (constant up to the next point), "bars"
            (horizontal, y are the chart's categories) or "back" (the same, wider and pale, behind the bars).
        name: in the legend; "" for none.
        x, y: where; None leaves a place free.
        colour: of all marks.
        texts: one a mark, what it stands for.
        trials: one a mark, the trial that it stands for (empty: none).
        symbol: of points: "circle", "open" (a ring), "cross", "star" or "ring" (a large one around another mark).
        sizes: of points in px, one a mark (empty: as usual).
    """

    kind: Literal["points", "line", "steps", "bars", "back"]
    name: str
    x: Sequence[float | None]
    y: Sequence[float | str | None]
    colour: str = GREY
    texts: Sequence[str] = ()
    trials: Sequence[int] = ()
    symbol: str = "circle"
    sizes: Sequence[float] = ()


@dataclass(frozen=True)
class Rule:
    """A straight line across a chart: at a value of one axis, or where both are equal (axis "xy")."""

    axis: Literal["x", "y", "xy"]
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A picture with one pair of axes.

    Attributes:
        key: names it among those of a page.
        title, x, y: texts.
        series, rules: what is drawn, in that order.
        logarithmic: the axes that are, out of "x" and "y".
        categories: of a chart with bars: from the top.
        summary: what it shows, in words, for those who don't see it.
        empty: why there is nothing to draw, "" where there is.
    """

    key: str
    title: str
    x: str
    y: str
    series: Sequence[Series] = ()
    rules: Sequence[Rule] = ()
    logarithmic: Collection[str] = ()
    categories: Sequence[str] = ()
    summary: str = ""
    empty: str = ""


def colour_of(method: str) -> str:
    """The colour of a method, in all pictures the same."""
    return _METHODS.get(method) or _OTHERS[sum(method.encode()) % len(_OTHERS)]
