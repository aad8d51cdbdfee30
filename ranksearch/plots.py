"""Pictures of a front and of one layer's errors: interactive Plotly pages, and PNGs for print.

Accuracy of the front is that on the report images. Dominated trials are scored on the search images only, so they are
drawn by that accuracy, and the legend says so.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from math import ceil, floor, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch.drawing import BLUE, COLOURS, GREY, SYMBOLS, VERMILION, Guide, Picture, Series, figure, page, png

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ranksearch.layerwise import Decomposition
    from ranksearch.space import BudgetSpec

_FRONT, _DOMINATED, _DENSE = "Front", "Not on the front (accuracy on search images)", "Dense network"
_X_TITLE = "GMACs per image (share of dense)"
_Y_TITLE = "Top-1 accuracy, report images (%)"


def front_picture(
    trials: pd.DataFrame,
    front: pd.DataFrame,
    *,
    dense: Mapping[str, float],
    title: str,
    budget: BudgetSpec | None = None,
    baselines: Mapping[str, pd.DataFrame] | None = None,
) -> Picture:
    """Accuracy against GMACs.

    Args:
        trials: one row a trial, with at least ``number``, ``state``, ``origin``, ``accuracy_search``, ``macs``,
            ``macs_ratio``, ``gmacs``, ``params``, ``on_front``.
        front: one row a point, with at least ``trial``, ``origin``, ``accuracy``, ``accuracy_low``, ``accuracy_high``,
            ``accuracy_search``, ``macs``, ``macs_ratio``, ``gmacs``, ``params``. Accuracies are from 0 to 1.
        dense: ``accuracy``, ``accuracy_search``, ``macs`` and ``params`` of the dense network.
        title: above the figure.
        budget: what the search may cost and lose: dashed lines.
        baselines: name to another search's front, of the same dense network.
    """
    others = baselines or {}
    lines = [
        _front_line(frame, name=name, colour=COLOURS[2 + i % (len(COLOURS) - 3)], symbol=SYMBOLS[1 + i % 8])
        for i, (name, frame) in enumerate(others.items())
    ]
    own = _front_line(front, name=f"{_FRONT}, this search" if others else _FRONT)
    return Picture(
        title=title,
        x_title=_X_TITLE,
        y_title=_Y_TITLE,
        series=(_dominated_dots(_dominated(trials)), own, *lines, _dense_point(dense)),
        guides=() if budget is None else _budget_lines(budget, dense),
        ticks=_ticks([trials, *others.values()], dense),
    )


def front_figure(
    trials: pd.DataFrame,
    front: pd.DataFrame,
    *,
    dense: Mapping[str, float],
    title: str,
    budget: BudgetSpec | None = None,
    baselines: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """The interactive figure of :func:`front_picture`, which takes the same."""
    return figure(front_picture(trials, front, dense=dense, title=title, budget=budget, baselines=baselines))


def front_html(
    trials: pd.DataFrame,
    front: pd.DataFrame,
    *,
    dense: Mapping[str, float],
    title: str,
    budget: BudgetSpec | None = None,
) -> str:
    """A page that needs no network: the figure of :func:`front_figure` and the front as a table."""
    import pandas as pd

    drawn = front_figure(trials, front, dense=dense, title=title, budget=budget)
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
{drawn.to_html(include_plotlyjs=True, full_html=False, default_height="36em")}
{pd.DataFrame(shown).to_html(index=False, border=0)}
</body>
</html>
"""


def front_png(
    trials: pd.DataFrame,
    front: pd.DataFrame,
    path: Path,
    *,
    dense: Mapping[str, float],
    title: str,
    budget: BudgetSpec | None = None,
) -> None:
    """Write the same figure to ``path`` as a PNG, for print: 1600 by 1000 pixels."""
    path.write_bytes(png(front_picture(trials, front, dense=dense, title=title, budget=budget)))


def errors_html(found: Decomposition, path: Path) -> None:
    """Write a page that needs no network: relative error of one layer against its MACs, a line a format."""
    path.write_text(page(_errors_picture(found)), encoding="utf-8")


def errors_png(found: Decomposition, path: Path) -> None:
    """Write the same figure to ``path`` as a PNG, for print: 1600 by 1000 pixels."""
    path.write_bytes(png(_errors_picture(found)))


def _errors_picture(found: Decomposition) -> Picture:
    series = []
    for i, name in enumerate(dict.fromkeys(row.format for row in found.rows)):
        rows = [row for row in found.rows if row.format == name]
        series.append(
            Series(
                name=name,
                x=[100 * row.macs_ratio for row in rows],
                y=[100 * row.relative_error for row in rows],
                look="line",
                colour=COLOURS[i % len(COLOURS)],
                symbol=SYMBOLS[i % len(SYMBOLS)],
                hover=[
                    f"ranks {row.ranks}<br>sensitivity {row.sensitivity:.4g}<br>error {100 * row.relative_error:.2f} %"
                    f"<br>{100 * row.macs_ratio:.1f} % of the MACs"
                    for row in rows
                ],
            )
        )
    if found.chosen is not None:
        row = found.chosen
        x, y, name = [100 * row.macs_ratio], [100 * row.relative_error], f"{row.format} {row.ranks}"
        series.append(Series(name=name, x=x, y=y, look="dots", colour="#000000", symbol="star", size_px=20))
    return Picture(
        title=f"{found.layer}: {found.kind} factors",
        x_title="MACs of the layer, share of dense (%)",
        y_title="Relative squared error (%)",
        series=tuple(series),
    )


def _budget_lines(budget: BudgetSpec, dense: Mapping[str, float]) -> tuple[Guide, ...]:
    lines = []
    gmacs, limit = dense["macs"] / 1e9, budget.max_macs_ratio
    if limit is not None:
        lines.append(Guide(axis="x", at=limit * gmacs, label=f"budget: {100 * limit:g} % of the MACs"))
    lines += [
        Guide(axis="x", at=share * gmacs, label=f"target: {100 * share:g} %")
        for share in budget.targets
        if share != limit
    ]
    if budget.max_drop is not None:
        # The budget counts on the search images; the axis shows the report images.
        at = 100 * dense["accuracy"] - budget.max_drop
        lines.append(Guide(axis="y", at=at, label=f"budget: {budget.max_drop:g} points under dense"))
    return tuple(lines)


def _dominated(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[(trials["state"] == "COMPLETE") & ~trials["on_front"].astype(bool)]


def _dominated_dots(dots: pd.DataFrame) -> Series:
    return Series(
        name=_DOMINATED,
        x=dots["gmacs"].tolist(),
        y=(100 * dots["accuracy_search"]).tolist(),
        look="dots",
        colour=GREY,
        hollow=True,
        size_px=7,
        hover=[_hover(row, row["number"]) for row in dots.to_dict("records")],
        keys=dots["number"].tolist(),
    )


def _front_line(front: pd.DataFrame, *, name: str = _FRONT, colour: str = BLUE, symbol: str = "circle") -> Series:
    """In steps: up to the next point's MACs, a point's accuracy is the best to be had."""
    line = front.sort_values("macs")
    return Series(
        name=name,
        x=line["gmacs"].tolist(),
        y=(100 * line["accuracy"]).tolist(),
        look="step",
        colour=colour,
        symbol=symbol,
        size_px=9,
        low=(100 * line["accuracy_low"]).tolist(),
        high=(100 * line["accuracy_high"]).tolist(),
        hover=[_hover(row, row["trial"]) for row in line.to_dict("records")],
        keys=line["trial"].tolist(),
    )


def _dense_point(dense: Mapping[str, float]) -> Series:
    row = {**dense, "gmacs": dense["macs"] / 1e9, "macs_ratio": 1.0}
    return Series(
        name=_DENSE,
        x=[row["gmacs"]],
        y=[100 * dense["accuracy"]],
        look="dots",
        colour=VERMILION,
        symbol="diamond",
        size_px=13,
        hover=[_hover(row, None)],
    )


def _hover(row: Mapping[Any, Any], number: int | None) -> str:
    """What a point says when it is pointed at."""
    lines = [_DENSE if number is None else f"Trial {number} ({html.escape(str(row['origin']))})"]
    if row.get("fidelity", 1) < 1:
        lines.append(f"after {100 * row['fidelity']:g} % of the training")
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


def _ticks(frames: Sequence[pd.DataFrame], dense: Mapping[str, float]) -> tuple[list[float], list[str]]:
    """Round shares of dense that span the points, as GMACs, with both written on each tick."""
    shares = [1.0, *(share for frame in frames for share in frame["macs_ratio"] if not isnan(share))]
    step = 0.1 if max(shares) - min(shares) <= 0.8 else 0.2
    first, last = floor(min(shares) / step + 1e-9), ceil(max(shares) / step - 1e-9)
    chosen = [step * i for i in range(first, last + 1)]
    gmacs = dense["macs"] / 1e9
    return [share * gmacs for share in chosen], [f"{share * gmacs:.3g}\n({100 * share:.0f} %)" for share in chosen]
