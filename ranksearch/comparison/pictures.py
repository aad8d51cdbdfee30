"""Pictures of a comparison: hypervolume over trials and over time, and accuracy at the targets.

Lines are means over the seeds, bands and bars reach from the worst to the best seed. Colours are those of
:mod:`ranksearch.drawing`; strategies also differ in the shape of their points.
"""

from __future__ import annotations

import html
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ranksearch.comparison.result import Cell, Comparison, Run
from ranksearch.drawing import COLOURS, MARKERS, SYMBOLS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

_HYPERVOLUME = "Hypervolume, share of the box"
_TRIALS, _MINUTES = "Trials", "Wall time of the search (minutes)"
_MACS, _ACCURACY = "MACs per image, share of dense (%)", "Top-1 accuracy, report images (%)"
_WHEN = {"before": "as searched", "after": "fine-tuned"}


@dataclass(frozen=True, kw_only=True)
class Band:
    """A figure over the seeds, along an axis."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def hypervolume_band(runs: Sequence[Run], axis: str) -> Band:
    """Hypervolume over ``trials`` or ``minutes``, in steps: each seed keeps its value to its next trial, or for good.

    Before a seed's first trial its value is 0.
    """
    places = [[_along(point.trials, point.seconds, axis) for point in run.curve] for run in runs]
    values = [[0.0, *accumulate((point.hypervolume for point in run.curve), max)] for run in runs]
    grid = sorted({x for xs in places for x in xs})
    rows = [[most[bisect_right(xs, x)] for xs, most in zip(places, values, strict=True)] for x in grid]
    return Band(
        x=tuple(grid),
        mean=tuple(sum(row) / len(row) for row in rows),
        low=tuple(min(row) for row in rows),
        high=tuple(max(row) for row in rows),
    )


def _along(trials: int, seconds: float, axis: str) -> float:
    return float(trials) if axis == "trials" else seconds / 60


def accuracy_band(runs: Sequence[Run], when: str) -> Band:
    """Accuracy ``before`` or ``after`` training at each target that a seed reaches, over the mean MACs; in percent."""
    columns = list(zip(*(run.cells for run in runs), strict=True))
    found = [[cell for cell in column if getattr(cell, when) is not None] for column in columns]
    rows = [(_percents(cells, "macs_ratio"), _percents(cells, when)) for cells in found if cells]
    return Band(
        x=tuple(sum(macs) / len(macs) for macs, _ in rows),
        mean=tuple(sum(values) / len(values) for _, values in rows),
        low=tuple(min(values) for _, values in rows),
        high=tuple(max(values) for _, values in rows),
    )


def _percents(cells: Sequence[Cell], name: str) -> list[float]:
    return [100 * getattr(cell, name) for cell in cells]


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A strategy that searched, and how it is drawn."""

    strategy: str
    runs: Sequence[Run]
    colour: str
    symbol: str


def _looks(found: Comparison) -> Iterator[_Look]:
    for i, strategy in enumerate(found.strategies):
        # Beyond nine strategies the symbols move on against the colours.
        turn, place = divmod(i, len(COLOURS))
        symbol = SYMBOLS[(place + turn) % len(SYMBOLS)]
        runs = [run for run in found.runs if run.strategy == strategy]
        if runs:
            yield _Look(strategy=strategy, runs=runs, colour=COLOURS[place], symbol=symbol)


def comparison_figure(found: Comparison) -> Figure:
    """An interactive figure of three panels."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=2, specs=[[{}, {}], [{"colspan": 2}, None]], vertical_spacing=0.14)
    for look in _looks(found):
        for column, axis in ((1, "trials"), (2, "minutes")):
            for trace in _hypervolume_traces(look, axis):
                figure.add_trace(trace, 1, column)
        for trace in _accuracy_traces(look, found.fine_tune_steps > 0):
            figure.add_trace(trace, 2, 1)
    figure.update_xaxes(title=_TRIALS, row=1, col=1)
    figure.update_xaxes(title=_MINUTES, row=1, col=2)
    figure.update_xaxes(title=_MACS, row=2, col=1)
    figure.update_yaxes(title=_HYPERVOLUME, row=1)
    figure.update_yaxes(title=_ACCURACY, row=2, col=1)
    figure.update_layout(title={"text": html.escape(_title(found))}, template="plotly_white", font={"size": 14})
    return figure


def _hypervolume_traces(look: _Look, axis: str) -> list[Scatter]:
    """The band's two edges with the area between them, and the mean."""
    from plotly.graph_objects import Scatter

    band, name = hypervolume_band(look.runs, axis), html.escape(look.strategy)
    edge = {"mode": "lines", "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip"}
    common = {"x": band.x, "name": name, "legendgroup": name, "showlegend": False}
    return [
        Scatter(**common, **edge, y=band.low),
        Scatter(**common, **edge, y=band.high, fill="tonexty", fillcolor=f"rgba{(*_rgb(look.colour), 0.15)}"),
        Scatter(
            **common,
            y=band.mean,
            mode="lines+markers",
            line={"color": look.colour, "shape": "hv"},
            marker={"symbol": look.symbol, "size": 6},
        ),
    ]


def _accuracy_traces(look: _Look, trained: bool) -> list[Scatter]:
    """Points with their range: filled as the search scored them, or filled after training and open before."""
    from plotly.graph_objects import Scatter

    traces, name = [], html.escape(look.strategy)
    for when, words in _WHEN.items():
        band = accuracy_band(look.runs, when)
        if band.x:
            high = [a - b for a, b in zip(band.high, band.mean, strict=True)]
            low = [a - b for a, b in zip(band.mean, band.low, strict=True)]
            symbol = f"{look.symbol}-open" if trained and when == "before" else look.symbol
            traces.append(
                Scatter(
                    x=band.x,
                    y=band.mean,
                    error_y={"array": high, "arrayminus": low, "thickness": 1},
                    mode="markers",
                    marker={"symbol": symbol, "color": look.colour, "size": 11},
                    name=f"{name}, {words}" if trained else name,
                    legendgroup=name,
                )
            )
    return traces


def comparison_html(found: Comparison) -> str:
    """A page that needs no network: the figure, and the summary as a table."""
    page = comparison_figure(found).to_html(include_plotlyjs=True, full_html=False, default_height="54em")
    table = found.summary().to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}", na_rep="-")
    name = html.escape(_title(found))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>{name}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: right; }}
</style>
</head>
<body>
{page}
{table}
</body>
</html>
"""


def comparison_png(found: Comparison) -> bytes:
    """The same figure as a PNG, for print: 2400 by 900 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(16, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    over_trials, over_time, accuracy = drawing.subplots(1, 3)
    for look in _looks(found):
        for axes, axis in ((over_trials, "trials"), (over_time, "minutes")):
            band = hypervolume_band(look.runs, axis)
            axes.step(band.x, band.mean, where="post", color=look.colour, marker=MARKERS[look.symbol], markersize=3)
            axes.fill_between(band.x, band.low, band.high, step="post", color=look.colour, alpha=0.15, linewidth=0)
        for when, words in _WHEN.items():
            band, filled = accuracy_band(look.runs, when), when == "after" or not found.fine_tune_steps
            bars = [
                [a - b for a, b in zip(band.mean, band.low, strict=True)],
                [a - b for a, b in zip(band.high, band.mean, strict=True)],
            ]
            if band.x:
                label = f"{look.strategy}, {words}" if found.fine_tune_steps else look.strategy
                face = look.colour if filled else "none"
                accuracy.errorbar(
                    band.x, band.mean, yerr=bars, fmt=MARKERS[look.symbol], color=look.colour, markerfacecolor=face,
                    elinewidth=0.8, capsize=2, label=label.replace("$", r"\$"),
                )  # fmt: skip
    over_trials.set(xlabel=_TRIALS, ylabel=_HYPERVOLUME)
    over_time.set(xlabel=_MINUTES, ylabel=_HYPERVOLUME)
    accuracy.set(xlabel=_MACS, ylabel=_ACCURACY)
    for axes in (over_trials, over_time, accuracy):
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    if accuracy.get_legend_handles_labels()[0]:
        drawing.legend(loc="outside lower center", ncols=4, frameon=False)
    drawing.suptitle(_title(found).replace("$", r"\$"))
    file = io.BytesIO()
    drawing.savefig(file, format="png")
    return file.getvalue()


def _title(found: Comparison) -> str:
    count = len(found.seeds)
    return f"{found.name}: mean and range over {count} seed{'s' if count > 1 else ''}"


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
