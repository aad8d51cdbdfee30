"""Pictures of a front and of one layer's errors: interactive Plotly pages, and PNGs for print.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart; the kinds of points also differ in
shape. Accuracy of the front is that on the report images. Dominated trials are scored on the search images only, so
they are drawn by that accuracy, and the legend says so.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure, Scatter

    from ranksearch.layerwise import Decomposition

_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
_FRONT, _DOMINATED, _DENSE = "Front", "Dominated (accuracy on search images)", "Dense network"
_X_TITLE = "GMACs per image (share of dense)"
_Y_TITLE = "Top-1 accuracy, report images (%)"


def front_figure(trials: pd.DataFrame, front: pd.DataFrame, *, dense: Mapping[str, float], title: str) -> Figure:
    """An interactive figure of accuracy against GMACs.

    Args:
        trials: one row a trial, with at least ``number``, ``state``, ``origin``, ``accuracy_search``, ``macs``,
            ``macs_ratio``, ``gmacs``, ``params``, ``on_front``.
        front: one row a point, with at least ``trial``, ``origin``, ``accuracy``, ``accuracy_low``, ``accuracy_high``,
            ``accuracy_search``, ``macs``, ``macs_ratio``, ``gmacs``, ``params``. Accuracies are from 0 to 1.
        dense: ``accuracy``, ``accuracy_search``, ``macs`` and ``params`` of the dense network.
        title: above the figure.
    """
    from plotly.graph_objects import Figure

    ticks, labels = _ticks(trials, dense)
    figure = Figure([_dominated_dots(_dominated(trials)), _front_line(front), _dense_point(dense)])
    figure.update_layout(
        title={"text": html.escape(title)},
        template="plotly_white",
        font={"size": 14},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.22},
    )
    figure.update_xaxes(title=_X_TITLE, tickvals=ticks, ticktext=[label.replace("\n", "<br>") for label in labels])
    figure.update_yaxes(title=_Y_TITLE)
    return figure


def front_html(trials: pd.DataFrame, front: pd.DataFrame, *, dense: Mapping[str, float], title: str) -> str:
    """A page that needs no network: the figure of :func:`front_figure` and the front as a table."""
    import pandas as pd

    figure = front_figure(trials, front, dense=dense, title=title)
    shown = {
        "trial": front["trial"],
        "accuracy, report (%)": [f"{100 * value:.2f}" for value in front["accuracy"]],
        "interval (%)": [
            _interval(low, high) for low, high in zip(front["accuracy_low"], front["accuracy_high"], strict=True)
        ],
        "accuracy, search (%)": [f"{100 * value:.2f}" for value in front["accuracy_search"]],
        "GMACs": [f"{value:.4g}" for value in front["gmacs"]],
        "share of dense (%)": [f"{100 * value:.1f}" for value in front["macs_ratio"]],
        "parameters": [f"{value:,}" for value in front["params"]],
        "origin": front["origin"],
    }
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><title>{name}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: right; }}
</style>
</head>
<body>
{figure.to_html(include_plotlyjs=True, full_html=False, default_height="36em")}
{pd.DataFrame(shown).to_html(index=False, border=0)}
</body>
</html>
"""


def front_png(trials: pd.DataFrame, front: pd.DataFrame, path: Path, *, dense: Mapping[str, float], title: str) -> None:
    """Write the same figure to ``path`` as a PNG, for print: 1600 by 1000 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dots = _dominated(trials)
    axes.scatter(
        dots["gmacs"], 100 * dots["accuracy_search"], s=18, facecolors="none", edgecolors=_GREY, label=_DOMINATED
    )
    line = front.sort_values("macs")
    percent = 100 * line["accuracy"]
    bars = [percent - 100 * line["accuracy_low"], 100 * line["accuracy_high"] - percent]
    axes.step(line["gmacs"], percent, where="post", color=_BLUE, linewidth=1.2)
    axes.errorbar(
        line["gmacs"], percent, yerr=bars, fmt="o", color=_BLUE, markersize=5, elinewidth=0.8, capsize=2, label=_FRONT
    )
    axes.plot(dense["macs"] / 1e9, 100 * dense["accuracy"], "D", color=_VERMILION, markersize=8, label=_DENSE)
    ticks, labels = _ticks(trials, dense)
    axes.set_xticks(ticks, labels)
    axes.set(title=title.replace("$", r"\$"), xlabel=_X_TITLE, ylabel=_Y_TITLE)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def errors_html(found: Decomposition, path: Path) -> None:
    """Write a page that needs no network: relative error of one layer against its MACs, a line a format."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for name, (colour, symbol) in _styles(found).items():
        rows = [row for row in found.rows if row.format == name]
        figure.add_trace(
            Scatter(
                name=name,
                x=[100 * row.macs_ratio for row in rows],
                y=[100 * row.relative_error for row in rows],
                mode="lines+markers",
                line={"color": colour},
                marker={"symbol": symbol, "size": 8},
                text=[f"ranks {row.ranks}<br>sensitivity {row.sensitivity:.4g}" for row in rows],
                hovertemplate="%{text}<br>error %{y:.2f} %<br>%{x:.1f} % of the MACs",
            )
        )
    if found.chosen is not None:
        row = found.chosen
        figure.add_trace(
            Scatter(
                name=f"{row.format} {row.ranks}",
                x=[100 * row.macs_ratio],
                y=[100 * row.relative_error],
                mode="markers",
                marker={"symbol": "star", "size": 16, "color": "black"},
            )
        )
    figure.update_layout(title={"text": html.escape(_errors_title(found))}, template="plotly_white", font={"size": 14})
    figure.update_xaxes(title=_MACS_TITLE)
    figure.update_yaxes(title=_ERROR_TITLE)
    path.write_text(figure.to_html(include_plotlyjs=True, default_height="36em"), encoding="utf-8")


def errors_png(found: Decomposition, path: Path) -> None:
    """Write the same figure to ``path`` as a PNG, for print: 1600 by 1000 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (colour, symbol) in _styles(found).items():
        rows = [row for row in found.rows if row.format == name]
        shares, errors = [100 * row.macs_ratio for row in rows], [100 * row.relative_error for row in rows]
        axes.plot(shares, errors, marker=MARKERS[symbol], color=colour, linewidth=1.2, markersize=4, label=name)
    if found.chosen is not None:
        row = found.chosen
        label = f"{row.format} {row.ranks}"
        axes.plot(100 * row.macs_ratio, 100 * row.relative_error, "k*", markersize=12, linestyle="none", label=label)
    axes.set(title=_errors_title(found).replace("$", r"\$"), xlabel=_MACS_TITLE, ylabel=_ERROR_TITLE)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


_MACS_TITLE = "MACs of the layer, share of dense (%)"
_ERROR_TITLE = "Relative squared error (%)"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C", "#A6761D")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x", "pentagon")
MARKERS = dict(zip(SYMBOLS, "osD^vP*Xp", strict=True))
"""Matplotlib's names of the symbols."""


def _styles(found: Decomposition) -> dict[str, tuple[str, str]]:
    """Colour and symbol of every format that has a line."""
    names = dict.fromkeys(row.format for row in found.rows)
    return {name: (COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]) for i, name in enumerate(names)}


def _errors_title(found: Decomposition) -> str:
    return f"{found.layer}: {found.kind} factors"


def _dominated(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[(trials["state"] == "COMPLETE") & ~trials["on_front"].astype(bool)]


def _dominated_dots(dots: pd.DataFrame) -> Scatter:
    from plotly.graph_objects import Scatter

    return Scatter(
        name=_DOMINATED,
        x=dots["gmacs"].tolist(),
        y=(100 * dots["accuracy_search"]).tolist(),
        mode="markers",
        marker={"color": _GREY, "size": 7, "symbol": "circle-open"},
        text=[_hover(row, row["number"]) for row in dots.to_dict("records")],
        hovertemplate="%{text}<extra></extra>",
    )


def _front_line(front: pd.DataFrame) -> Scatter:
    from plotly.graph_objects import Scatter

    line = front.sort_values("macs")
    percent = 100 * line["accuracy"]
    return Scatter(
        name=_FRONT,
        x=line["gmacs"].tolist(),
        y=percent.tolist(),
        error_y={
            "array": (100 * line["accuracy_high"] - percent).tolist(),
            "arrayminus": (percent - 100 * line["accuracy_low"]).tolist(),
            "thickness": 1,
        },
        mode="lines+markers",
        # Up to the next point's MACs, this point's accuracy is the best to be had.
        line={"shape": "hv", "color": _BLUE, "width": 2},
        marker={"size": 9},
        text=[_hover(row, row["trial"]) for row in line.to_dict("records")],
        hovertemplate="%{text}<extra></extra>",
    )


def _dense_point(dense: Mapping[str, float]) -> Scatter:
    from plotly.graph_objects import Scatter

    row = {**dense, "gmacs": dense["macs"] / 1e9, "macs_ratio": 1.0}
    return Scatter(
        name=_DENSE,
        x=[row["gmacs"]],
        y=[100 * dense["accuracy"]],
        mode="markers",
        marker={"color": _VERMILION, "size": 13, "symbol": "diamond"},
        text=[_hover(row, None)],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(row: Mapping[Any, Any], number: int | None) -> str:
    """What a point says when it is pointed at."""
    lines = [_DENSE if number is None else f"Trial {number} ({html.escape(str(row['origin']))})"]
    accuracy = row.get("accuracy")
    if accuracy is not None and accuracy == accuracy:
        interval = f" [{_interval(row['accuracy_low'], row['accuracy_high'])}]" if "accuracy_low" in row else ""
        lines.append(f"accuracy, report: {100 * accuracy:.2f} %{interval}")
    lines.append(f"accuracy, search: {100 * row['accuracy_search']:.2f} %")
    lines.append(f"{row['gmacs']:.4g} GMACs, {100 * row['macs_ratio']:.1f} % of dense")
    lines.append(f"{int(row['params']):,} parameters")
    return "<br>".join(lines)


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.2f} to {100 * high:.2f}"


def _ticks(trials: pd.DataFrame, dense: Mapping[str, float]) -> tuple[list[float], list[str]]:
    """Round shares of dense that span the points, as GMACs, with both written on each tick."""
    shares = [1.0, *(trials.loc[trials["state"] == "COMPLETE", "macs_ratio"])]
    step = 0.1 if max(shares) - min(shares) <= 0.8 else 0.2
    first, last = floor(min(shares) / step + 1e-9), ceil(max(shares) / step - 1e-9)
    chosen = [step * i for i in range(first, last + 1)]
    gmacs = dense["macs"] / 1e9
    return [share * gmacs for share in chosen], [f"{share * gmacs:.3g}\n({100 * share:.0f} %)" for share in chosen]
