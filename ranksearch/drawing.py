"""Pictures as values, and two ways to draw one: an interactive Plotly figure, and a PNG for print.

A picture is lines, dots or bars on two labelled axes, or a map of shaded cells. Colours are from Okabe and Ito's
palette, which colour-blind readers can tell apart, and shades from cividis, which has no hue to confuse; series also
differ in shape, so that a print in grey can be read.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8C8C8C"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", GREY, "#A6761D")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x", "pentagon")
MARKERS = dict(zip(SYMBOLS, "osD^vP*Xp", strict=True))
"""Matplotlib's names of the symbols."""

LEGEND: dict[str, Any] = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
"""Plotly's legend: under the axes, which make room for it."""

_INCHES, _DPI = (8.0, 5.0), 200
_ROW_INCHES, _ROW_PX = 0.26, 24
"""Height that one row of bars or cells needs."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together."""

    name: str
    """In the legend; empty: not there."""
    x: Sequence[float]
    y: Sequence[float] | Sequence[str]
    """Of bars, which lie along x, the names of their rows."""
    look: Literal["line", "step", "dots", "bars"]
    """A step keeps its height up to the next point."""
    colour: str
    symbol: str = "circle"
    """One of ``SYMBOLS``; an empty one where a line has no marks."""
    hollow: bool = False
    """Whether marks are outlines only."""
    size_px: float = 8
    low: Sequence[float] = ()
    """Lower ends of the intervals of y, if it has any."""
    high: Sequence[float] = ()
    hover: Sequence[str] = ()
    """What Plotly says of each point, in HTML."""
    keys: Sequence[int] = ()
    """What a click on each point stands for."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A dashed line across the picture."""

    axis: Literal["x", "y"]
    """The axis that it crosses, at ``at``."""
    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A map of shaded cells."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    """Percentages, a sequence a row."""
    texts: Sequence[Sequence[str]]
    """What is written in the cells."""
    scale: str
    """What the shades mean, with its unit."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn."""

    title: str
    x_title: str
    """With the unit, as the other one."""
    y_title: str
    series: tuple[Series, ...] = ()
    guides: tuple[Guide, ...] = ()
    cells: Cells | None = None
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    """Places on the x axis and their labels."""

    @property
    def rows(self) -> tuple[str, ...]:
        """The names along the y axis, top first, of bars and of cells; else none."""
        if self.cells is not None:
            return tuple(self.cells.rows)
        return tuple(dict.fromkeys(str(y) for one in self.series if one.look == "bars" for y in one.y))


def figure(picture: Picture) -> Figure:
    """The picture as an interactive Plotly figure; names in it cannot inject markup."""
    from plotly.graph_objects import Figure

    return Figure(plotly_json(picture))


def plotly_json(picture: Picture) -> dict[str, Any]:
    """The same in Plotly's JSON types, without the time that Plotly takes to check them."""
    traces = [_trace(one) for one in picture.series]
    x: dict[str, Any] = {"title": {"text": picture.x_title}, "automargin": True}
    y: dict[str, Any] = {"title": {"text": picture.y_title}, "automargin": True}
    layout: dict[str, Any] = {
        "title": {"text": html.escape(picture.title)},
        "template": "plotly_white",
        "font": {"size": 14},
        "hovermode": "closest",
        "legend": dict(LEGEND),
        "xaxis": x,
        "yaxis": y,
    }
    if picture.cells is not None:
        traces.append(_heatmap(picture.cells))
        x["type"] = "category"  # else Plotly takes some names for dates
    if picture.rows:
        layout["height"] = max(450, 170 + _ROW_PX * len(picture.rows))
        y["autorange"] = "reversed"
    if picture.ticks is not None:
        places, labels = picture.ticks
        x |= {"tickvals": list(places), "ticktext": [label.replace("\n", "<br>") for label in labels]}
    if picture.guides:
        layout |= {"shapes": [_line(one) for one in picture.guides], "annotations": [*map(_label, picture.guides)]}
    return {"data": traces, "layout": layout}


def _line(guide: Guide) -> dict[str, Any]:
    across = {"y0": 0, "y1": 1, "yref": "paper"} if guide.axis == "x" else {"x0": 0, "x1": 1, "xref": "paper"}
    ends = {f"{guide.axis}0": guide.at, f"{guide.axis}1": guide.at}
    return {"type": "line", "line": {"color": GREY, "dash": "dash", "width": 1.5}, **ends, **across}


def _label(guide: Guide) -> dict[str, Any]:
    at: dict[str, Any] = {"x": guide.at, "y": 1, "yref": "paper", "yanchor": "bottom"}
    if guide.axis == "y":
        at = {"y": guide.at, "x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {"text": html.escape(guide.label), "showarrow": False, **at}


def _trace(one: Series) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "name": html.escape(one.name),
        "x": list(one.x),
        "y": [html.escape(y) if isinstance(y, str) else y for y in one.y],
        "showlegend": bool(one.name),
        "marker": {"color": one.colour},
    }
    if one.hover:
        trace |= {"text": list(one.hover), "hovertemplate": "%{text}<extra></extra>"}
    if one.keys:
        trace["customdata"] = list(one.keys)
    if one.look == "bars":
        return trace | {"type": "bar", "orientation": "h", "textposition": "none"}
    mode = {"dots": "markers"}.get(one.look, "lines+markers" if one.symbol else "lines")
    if one.look != "dots":
        trace["line"] = {"color": one.colour, "width": 2, **({"shape": "hv"} if one.look == "step" else {})}
    if one.symbol:
        symbol = f"{one.symbol}-open" if one.hollow else one.symbol
        trace["marker"] |= {"size": one.size_px, "symbol": symbol}
    if one.low:
        values = [float(y) for y in one.y]
        above = [high - y for high, y in zip(one.high, values, strict=True)]
        below = [y - low for low, y in zip(one.low, values, strict=True)]
        trace["error_y"] = {"array": above, "arrayminus": below, "thickness": 1}
    return trace | {"type": "scatter", "mode": mode}


def _heatmap(cells: Cells) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": [html.escape(name).replace("\n", "<br>") for name in cells.columns],
        "y": [html.escape(name) for name in cells.rows],
        "z": [list(row) for row in cells.values],
        "text": [[html.escape(text) for text in row] for row in cells.texts],
        "texttemplate": "%{text}" if len(cells.columns) <= _WRITTEN else None,
        "hovertemplate": "%{y}<br>%{x}<br>%{text}<br>%{z:.1f} %<extra></extra>",
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": 100,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": cells.scale, "side": "right"}},
    }


_WRITTEN = 16
"""With more columns than this, cells are too narrow for text."""


def page(*pictures: Picture) -> str:
    """A page that needs no network: the interactive figures, one below the other."""
    parts = [
        figure(picture).to_html(
            full_html=False, include_plotlyjs=i == 0, default_height=None if picture.rows else "36em"
        )
        for i, picture in enumerate(pictures)
    ]
    head = '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"></head>\n<body>\n'
    return "\n".join([head, *parts, "</body>\n</html>\n"])


def png(picture: Picture) -> bytes:
    """The picture as a PNG for print: 1600 by 1000 pixels, taller where it has many rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(_INCHES[1], 1.6 + _ROW_INCHES * len(picture.rows))
    drawn = Figure(figsize=(_INCHES[0], height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    if picture.cells is not None:
        _draw_cells(axes, picture.cells)
    else:
        _draw_series(axes, picture)
    for guide in picture.guides:
        _draw_guide(axes, guide)
    if picture.ticks is not None:
        places, labels = picture.ticks
        axes.set_xticks(list(places), list(labels))
    axes.set(title=_plain(picture.title), xlabel=_plain(picture.x_title), ylabel=_plain(picture.y_title))
    if picture.rows and len(picture.series) > 1:
        drawn.legend(loc="outside lower center", ncols=len(picture.series), frameon=False)
    elif any(one.name for one in picture.series):
        axes.legend(frameon=False)
    written = io.BytesIO()
    drawn.savefig(written, format="png")
    return written.getvalue()


def _draw_series(axes: Axes, picture: Picture) -> None:
    bars = [one for one in picture.series if one.look == "bars"]
    place = {name: i for i, name in enumerate(picture.rows)}
    for one in picture.series:
        label = _plain(one.name) or None
        if one.look == "bars":
            height = 0.8 / len(bars)
            shift = height * (bars.index(one) - (len(bars) - 1) / 2)
            axes.barh([place[str(y)] + shift for y in one.y], one.x, height, color=one.colour, label=label)
            continue
        style: dict[str, Any] = {"marker": MARKERS[one.symbol] if one.symbol else None, "color": one.colour}
        style |= {"markersize": 0.55 * one.size_px, "markerfacecolor": "none" if one.hollow else one.colour}
        style |= {"linewidth": 1.2, "linestyle": "none" if one.look == "dots" else "-"}
        style["drawstyle"] = "steps-post" if one.look == "step" else "default"
        values = [float(y) for y in one.y]
        if one.low:
            below = [y - low for low, y in zip(one.low, values, strict=True)]
            above = [high - y for high, y in zip(one.high, values, strict=True)]
            axes.errorbar(one.x, values, yerr=[below, above], elinewidth=0.8, capsize=2, label=label, **style)
        else:
            axes.plot(one.x, values, label=label, **style)
    if picture.rows:
        axes.set_yticks(range(len(picture.rows)), [_plain(name) for name in picture.rows])
        axes.invert_yaxis()
        axes.margins(y=0.01)
    axes.grid(color="#DDDDDD", linewidth=0.6, axis="x" if picture.rows else "both")
    axes.set_axisbelow(True)


def _draw_cells(axes: Axes, cells: Cells) -> None:
    if not cells.columns or not cells.rows:
        return
    mesh = axes.pcolormesh(cells.values, cmap="cividis", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    if len(cells.columns) <= _WRITTEN:
        for i, (values, texts) in enumerate(zip(cells.values, cells.texts, strict=True)):
            for j, (value, text) in enumerate(zip(values, texts, strict=True)):
                colour = "white" if value < 55 else "black"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=5.5, color=colour)
    axes.set_yticks([i + 0.5 for i in range(len(cells.rows))], [_plain(name) for name in cells.rows])
    crowded = len(cells.columns) > _WRITTEN
    columns = [_plain(name) for name in cells.columns]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=90 if crowded else 0, fontsize=7)
    axes.invert_yaxis()
    axes.figure.colorbar(mesh, ax=axes, label=cells.scale)


def _draw_guide(axes: Axes, guide: Guide) -> None:
    line = axes.axvline if guide.axis == "x" else axes.axhline
    line(guide.at, color=GREY, linestyle="--", linewidth=1)
    place: dict[str, Any]
    if guide.axis == "x":
        place = {"xy": (guide.at, 1), "xycoords": ("data", "axes fraction"), "va": "top", "rotation": 90, "ha": "right"}
    else:
        place = {"xy": (0, guide.at), "xycoords": ("axes fraction", "data"), "va": "bottom", "ha": "left"}
    axes.annotate(_plain(guide.label), fontsize=8, color="#555555", **place)


def _plain(text: str) -> str:
    """Text that Matplotlib takes as it is, not as a formula."""
    return text.replace("$", r"\$")
