"""Pictures of a search: its course, the ranks along its front, where the MACs are, which layers matter.

Each is a :class:`ranksearch.drawing.Picture`, made from what the study records; nothing is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ranksearch.composition import composition
from ranksearch.drawing import BLUE, COLOURS, GREY, SYMBOLS, VERMILION, Cells, Picture, Series
from ranksearch.setting import Setting
from ranksearch.table import PREDICTED, LayerPrices, PriceTable
from ranksearch.trial import Trial

_COLUMNS = 40
"""A front of more points is shown by so many of them, evenly chosen, both ends among them."""
_LINES = 9
"""Lines that still can be told apart."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search was when one of its trials ended."""

    trials: int
    """That had ended, failed ones too."""
    end_ms: int
    """When, milliseconds since 1970."""
    hypervolume: float


def hypervolume_picture(
    courses: Mapping[str, Sequence[Progress]], axis: Literal["trials", "time"] = "trials"
) -> Picture:
    """Hypervolume of searches, by name, over the trials that ended or over the time since the first one ended."""
    series = []
    for i, (name, course) in enumerate(courses.items()):
        kept = _corners(course)
        begin = course[0].end_ms if course else 0
        x = [float(p.trials) if axis == "trials" else (p.end_ms - begin) / 60_000 for p in kept]
        hover = [f"{name}: {p.hypervolume:.4f} after {p.trials} trials" for p in kept]
        series.append(_line(i, name, x, [p.hypervolume for p in kept], hover, look="step"))
    return Picture(
        title="Hypervolume of the front",
        x_title="Trials that ended" if axis == "trials" else "Time since the first trial ended (minutes)",
        y_title="Hypervolume, share of the box",
        series=tuple(series),
    )


def _line(
    i: int,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    hover: Sequence[str],
    look: Literal["line", "step"] = "line",
) -> Series:
    """The line number ``i`` of a picture."""
    colour, symbol = COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]
    return Series(name=name, x=x, y=y, look=look, colour=colour, symbol=symbol, size_px=5, hover=hover)


def _corners(course: Sequence[Progress]) -> list[Progress]:
    """The points where the value changes, and both ends: what a line in steps needs."""
    inner = (b for a, b in pairwise(course) if b.hypervolume != a.hypervolume)
    kept = [*course[:1], *inner]
    return kept if not course or kept[-1] is course[-1] else [*kept, course[-1]]


def ranks_picture(setting: Setting, front: Sequence[Trial]) -> Picture:
    """The ranks of every layer along the front, from its cheapest to its dearest point; shades: the MACs kept."""
    chosen = _spread(front, _COLUMNS)
    networks = [composition(setting, trial) for trial in chosen]
    shares = [trial.outcome.macs / setting.dense["macs"] for trial in chosen if trial.outcome is not None]
    names = [layer.name for layer in networks[0]] if networks else []
    return Picture(
        title="Ranks along the front",
        x_title="Front: trial, share of dense MACs (%)",
        y_title="Layer",
        cells=Cells(
            rows=names,
            columns=[f"{t.number}\n{100 * share:.0f} %" for t, share in zip(chosen, shares, strict=True)],
            values=[[100 * network[i].macs_ratio for network in networks] for i in range(len(names))],
            texts=[[_short(network[i].format, network[i].ranks) for network in networks] for i in range(len(names))],
            scale="MACs of the layer, share of dense (%)",
        ),
    )


def _short(form: str, ranks: tuple[int, ...]) -> str:
    return ",".join(map(str, ranks)) if ranks else form


def macs_picture(setting: Setting, trials: Sequence[Trial]) -> Picture:
    """MACs by layer: of the dense network and of the networks of some trials, at most a few."""
    dense, table = setting.dense["macs"], setting.table
    rest = "not searched"
    bars = {"dense": {name: conv.macs for name, conv in table.convs.items()}}
    for trial in trials:
        bars[f"trial {trial.number}"] = {layer.name: layer.macs for layer in composition(setting, trial)}
    other = table.dense_macs - sum(bars["dense"].values())
    colours = (GREY, BLUE, VERMILION, *COLOURS[2:])
    series = []
    for (name, macs), colour in zip(bars.items(), colours, strict=False):
        rows = {**macs, rest: other}
        hover = [f"{layer}, {name}: {count / 1e6:.3g} million MACs" for layer, count in rows.items()]
        x = [100 * count / dense for count in rows.values()]
        series.append(Series(name=name, x=x, y=list(rows), look="bars", colour=colour, hover=hover))
    return Picture(
        title="Where the MACs are",
        x_title="MACs per image, share of the dense network's (%)",
        y_title="Layer",
        series=tuple(series),
    )


def importance_picture(importance: Mapping[str, float], of: str) -> Picture:
    """How much each layer's choice matters to ``of``, as :meth:`ranksearch.study.Study.importance` has it."""
    ordered = sorted(importance.items(), key=lambda item: -item[1])
    hover = [f"{name}: {100 * value:.1f} %" for name, value in ordered]
    bars = Series(
        name="",
        x=[100 * value for _, value in ordered],
        y=[name for name, _ in ordered],
        look="bars",
        colour=BLUE,
        hover=hover,
    )
    return Picture(
        title=f"Which layers decide about the {of}",
        x_title="Importance (PED-ANOVA), share of all layers' (%)",
        y_title="Layer",
        series=(bars,) if ordered else (),
    )


def sensitivity_picture(table: PriceTable, price: str | None = None) -> Picture:
    """What compressing one layer alone loses, against its MACs: a line a layer, through its best candidates.

    Of more than nine layers, those are drawn that lose most when half of their MACs go.

    Args:
        table: the price table.
        price: the loss, one that the table has; by default the first that it has measured, else the predicted one.
    """
    known = next((c.prices for layer in table.layers for c in layer.candidates if c.prices), ())
    price = price or next((name for name, _ in known), PREDICTED)
    curves = {layer.name: _frontier(layer, price) for layer in table.layers}
    steep = sorted(curves, key=lambda name: -_at_half(curves[name]))[:_LINES]
    series = []
    for i, name in enumerate(sorted(steep, key=list(curves).index)):
        x, y, hover = zip(*curves[name], strict=True)
        series.append(_line(i, name, x, y, [f"{name}: {one}" for one in hover]))
    title = "Sensitivity of layers"
    if len(curves) > len(steep):
        title += f": the {len(steep)} of {len(curves)} that lose most at half of their MACs"
    return Picture(
        title=title, x_title="MACs of the layer, share of dense (%)", y_title=_PRICES[price], series=tuple(series)
    )


_PRICES = {
    PREDICTED: "Predicted relative squared error (%)",
    "weight": "Relative squared error of the kernel (%)",
    "output": "Relative squared error of the output (%)",
    "divergence": "Divergence of the outputs (nats per image)",
    "loss": "Rise of the loss (nats per image)",
    "second-order": "Estimated rise of the loss (nats per image)",
    "drop": "Fall in accuracy (percentage points)",
}
_IN_PERCENT = (PREDICTED, "weight", "output", "drop")


def _frontier(layer: LayerPrices, price: str) -> list[tuple[float, float, str]]:
    """Share of the MACs, loss and name of the candidates that lose less than every cheaper one, by rising MACs."""
    kept: list[tuple[float, float, str]] = []
    scale = 100 if price in _IN_PERCENT else 1
    for candidate in layer.candidates:
        loss = scale * candidate.price(price)
        if not kept or loss < kept[-1][1]:
            share = 100 * candidate.macs / layer.conv.macs
            ranks = _short(candidate.format, candidate.ranks)
            kept.append((share, loss, f"{candidate.format} {ranks}, {loss:.3g} at {share:.0f} % of the MACs"))
    return kept


def _at_half(curve: Sequence[tuple[float, float, str]]) -> float:
    return min((loss for share, loss, _ in curve if share <= 50), default=curve[0][1])


def gates_picture(trial: Trial) -> Picture:
    """The gates that are open in each layer over the steps of a funnel run, as a share of those at its start.

    Of more than nine layers, those are drawn that lose most.

    Raises:
        ValueError: the trial is no funnel run that has recorded its gates.
    """
    history = trial.outcome.details.get("history", ()) if trial.outcome is not None else ()
    seen = [(entry["step"], entry["alive"]) for entry in history if "alive" in entry]
    if not seen:
        raise ValueError(f"a picture of gates needs a complete funnel run, trial {trial.number} is none.")
    first = {name: sum(alive) for name, alive in seen[0][1].items()}
    lines = {name: [100 * sum(alive[name]) / max(1, first[name]) for _, alive in seen] for name in first}
    shown = sorted(sorted(lines, key=lambda name: lines[name][-1])[:_LINES], key=list(lines).index)
    steps = [float(step) for step, _ in seen]
    series = []
    for i, name in enumerate(shown):
        hover = [f"{name}: {y:.0f} % of {first[name]} gates" for y in lines[name]]
        series.append(_line(i, name, steps, lines[name], hover))
    return Picture(
        title=f"Gates of trial {trial.number}",
        x_title="Step of training",
        y_title="Open gates, share of those at the start (%)",
        series=tuple(series),
    )


def _spread(trials: Sequence[Trial], count: int) -> list[Trial]:
    """At most ``count`` of the trials, evenly chosen, the first and the last among them."""
    if len(trials) <= count:
        return list(trials)
    return [trials[round(i * (len(trials) - 1) / (count - 1))] for i in range(count)]
