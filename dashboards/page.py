"""The page's parts, as Dash components: made from snapshots, without a decision of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dash import dcc, html

from dashboards.feed import Snapshot, outcome_of
from ranksearch.composition import LayerShare, composition
from ranksearch.trial import Trial, best_within, interval

PICTURES = {
    "hypervolume": "Hypervolume",
    "time": "Over time",
    "ranks": "Ranks",
    "macs": "MACs by layer",
    "sensitivity": "Sensitivity",
    "importance": "Importance",
    "gates": "Gates",
}
RULES = {
    "knee": "the knee",
    "max_macs_ratio": "most accurate with at most … % of the MACs",
    "max_gmacs": "most accurate with at most … GMACs",
    "max_drop": "cheapest that loses at most … points",
    "trial": "the trial of number …",
}
_STATES = {"running": "running", "finished": "finished", "stopped": "not running", "unknown": "unknown"}
_GRAPH: Any = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


def page(names: Sequence[str], *, pause_ms: int) -> html.Div:
    """The whole page, before the first data are in it."""
    return html.Div(
        [
            html.A("Skip to the front", href="#front-part", className="skip"),
            html.Header([html.H1(title(names)), html.Button("Day or night", id="theme", n_clicks=0)]),
            html.Main(
                [
                    _choice("study", "Study", {name: name for name in names}, names[0], hidden=len(names) < 2),
                    html.Section(id="progress", **_label("Progress")),
                    html.Div([_front_part(), _pick_part()], className="columns"),
                    html.Section(id="details", className="card", **_label("Layer by layer")),
                    _pictures_part(),
                    html.Section(id="troubles", className="card", **_label("Failures")),
                ],
                id="main",
            ),
            dcc.Interval(id="clock", interval=pause_ms),
            dcc.Store(id="versions", data={}),
            dcc.Store(id="drawn", data={}),
            dcc.Store(id="chosen", data={}),
            dcc.Download(id="download"),
            html.Div(id="theme-now", hidden=True),
        ]
    )


def title(names: Sequence[str]) -> str:
    """The page's heading: with the study's name, where it shows one."""
    return f"ranksearch: {names[0]}" if len(names) == 1 else "ranksearch"


def _label(text: str, **more: str) -> dict[str, Any]:
    """What a screen reader calls a part."""
    return {"aria-label": text, **{f"aria-{name}": value for name, value in more.items()}}


def _choice(name: str, title: str, options: Mapping[str, str], value: str, *, hidden: bool = False) -> html.Fieldset:
    radio = dcc.RadioItems(
        id=name, options=[{"label": label, "value": key} for key, label in options.items()], value=value
    )
    return html.Fieldset([html.Legend(title), radio], className="choice", hidden=hidden)


def _front_part() -> html.Section:
    return html.Section(
        [
            html.H2("Front of accuracy against MACs"),
            html.P("Click a point, or choose one in the table, to see it layer by layer.", className="hint"),
            html.Div(
                dcc.Graph(id="front", config=_GRAPH, style={"height": "100%"}),
                role="group",
                className="front-frame",
                **_label("Accuracy against GMACs; the table below has the same points"),
            ),
            html.Div(id="front-table", className="scroll", tabIndex=0, role="region", **_label("The front")),
        ],
        id="front-part",
        className="card wide",
        tabIndex=-1,
    )


def _pick_part() -> html.Section:
    return html.Section(
        [
            html.H2("Pick a network"),
            _choice("rule", "Pick", RULES, "knee"),
            html.Div(
                [
                    html.Label("Number for “…”", htmlFor="amount"),
                    dcc.Input(id="amount", type="number", value=50, min=0, step="any", debounce=False),
                ],
                className="field",
            ),
            _choice("slot", "It becomes", {"A": "point A", "B": "point B"}, "A"),
            html.Button("Pick", id="pick", n_clicks=0, className="main-button"),
            html.P(id="pick-answer", role="status"),
            html.H2("Take it with you"),
            html.P(
                "The rank map is a small JSON file: layer to format and ranks, without weights. Commands that export a "
                "chosen point with its weights, as it was measured, then stand below."
            ),
            html.Div(
                [html.Button(f"Export {slot}", id=f"export-{slot}", n_clicks=0, disabled=True) for slot in "AB"],
                className="buttons",
            ),
            html.P(id="export-answer", role="status"),
            html.Div(id="commands"),
        ],
        className="card",
        **_label("Pick and export"),
    )


def _pictures_part() -> html.Section:
    return html.Section(
        [
            html.H2("Pictures"),
            _choice("picture-name", "Show", PICTURES, "hypervolume"),
            html.Div(
                dcc.Graph(id="picture", config=_GRAPH, style={"height": "100%"}), role="group", id="picture-frame"
            ),
            html.P(id="picture-note", role="status"),
        ],
        className="card",
        **_label("Pictures"),
    )


def progress(shown: Snapshot, problem: str) -> list[Any]:
    """How far the search is, as tiles."""
    total, dense = shown.total, shown.study.setting.dense
    left = shown.minutes_left
    volume = f"hypervolume {shown.course[-1].hypervolume:.4f}" if shown.course else ""
    workers = f" of {count}" if (count := shown.study.space.resources.workers) else ""
    tiles = [
        ("State", _STATES[shown.state], _about(shown)),
        ("Trials", f"{shown.done:,} of {total:,}", f"{100 * shown.done / total:.0f} %"),
        ("Rate", _rate(shown.per_minute), "over the last trials"),
        ("Time left", "-" if left is None else _minutes(left), "at this rate"),
        ("Working now", f"{len(shown.running)}{workers}", _longest(shown)),
        ("Failed", f"{shown.failed:,}", shown.failures[0][0][:60] if shown.failures else "no trial"),
        ("Front", f"{len(shown.front)} points", volume),
        ("At half the MACs", *_best(shown, 0.5, dense)),
    ]
    bar = html.Progress(value=str(shown.done), max=str(total), **_label("Trials done"))
    parts = [html.Dl([_tile(*tile) for tile in tiles], className="tiles"), bar]
    return [*parts, html.P(problem, className="problem", role="alert")] if problem else parts


def _about(shown: Snapshot) -> str:
    if shown.state == "unknown":
        return "driven from elsewhere, and silent: at work or killed"
    return f"{shown.study.setting.model.name}, {shown.study.space.strategy.name}"


def _tile(name: str, value: str, note: str) -> html.Div:
    return html.Div([html.Dt(name), html.Dd(value, className="value"), html.Dd(note, className="note")])


def _rate(per_minute: float) -> str:
    if not per_minute:
        return "-"
    return f"{per_minute:.1f} / min" if per_minute >= 1 else f"{60 * per_minute:.1f} / h"


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _longest(shown: Snapshot) -> str:
    if not shown.running:
        return "no trial is being scored"
    seconds = time.time() - min(trial.start_ms for trial in shown.running) / 1000
    return f"the longest for {_minutes(max(0.0, seconds) / 60)}"


def _best(shown: Snapshot, share: float, dense: Mapping[str, float]) -> tuple[str, str]:
    best = best_within(shown.front, share * dense["macs"])
    if best is None:
        return "-", "no point of the front yet"
    return f"{100 * outcome_of(best).accuracy_search:.2f} %", f"trial {best.number}, search images"


def front_table(shown: Snapshot, chosen: Mapping[str, int]) -> html.Table:
    """The front with a button for each slot of each point: what a click on the picture does, for the keyboard."""
    dense = shown.study.setting.dense
    heads = ["Trial", "Choose", "Accuracy %", "95 % interval", "Search %", "MACs %", "GMACs", "Parameters"]
    rows = [_front_row(trial, dense, chosen) for trial in shown.front]
    dense_row = [
        html.Th("dense", scope="row"),
        html.Td(""),
        html.Td(f"{100 * dense['accuracy']:.2f}"),
        html.Td(""),
        html.Td(f"{100 * dense['accuracy_search']:.2f}"),
        html.Td("100.0"),
        html.Td(f"{dense['macs'] / 1e9:.4g}"),
        html.Td(f"{int(dense['params']):,}"),
    ]
    caption = html.Caption("The front, by rising MACs; accuracy on the report images, which decide nothing")
    head = html.Thead(html.Tr([html.Th(name, scope="col") for name in heads]))
    return html.Table([caption, head, html.Tbody([*rows, html.Tr(dense_row)])])


def _front_row(trial: Trial, dense: Mapping[str, float], chosen: Mapping[str, int]) -> html.Tr:
    outcome = outcome_of(trial)
    low, high = interval(outcome.accuracy, outcome.report_images) if outcome.accuracy is not None else (0.0, 0.0)
    pressed = {slot: str(chosen.get(slot) == trial.number).lower() for slot in "AB"}
    buttons = [
        html.Button(
            slot,
            id={"type": "choose", "slot": slot, "trial": trial.number},
            n_clicks=0,
            **_label(f"Trial {trial.number} becomes point {slot}", pressed=pressed[slot]),
        )
        for slot in "AB"
    ]
    cells: list[Any] = [
        html.Span(buttons, className="buttons"),
        "-" if outcome.accuracy is None else f"{100 * outcome.accuracy:.2f}",
        "-" if outcome.accuracy is None else f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * outcome.accuracy_search:.2f}",
        f"{100 * outcome.macs / dense['macs']:.1f}",
        f"{outcome.macs / 1e9:.4g}",
        f"{outcome.params:,}",
    ]
    return html.Tr([html.Th(str(trial.number), scope="row"), *(html.Td(cell) for cell in cells)])


def details(shown: Snapshot, chosen: Mapping[str, int], texts: Mapping[str, str]) -> list[Any]:
    """The chosen points layer by layer, side by side."""
    points = {slot: shown.trials[n] for slot, n in sorted(chosen.items()) if n in shown.trials}
    if not points:
        return [html.H2("Layer by layer"), html.P("No point is chosen yet.")]
    about = [html.P([html.Strong(f"{slot}: trial {t.number}. "), texts[slot]]) for slot, t in points.items()]
    networks = {slot: composition(shown.study.setting, trial) for slot, trial in points.items()}
    heads = ["Layer", "Dense MACs %"]
    for slot in networks:
        heads += [f"{slot}: ranks", f"{slot}: MACs %", f"{slot}: error %"]
    dense_macs = shown.study.setting.dense["macs"]
    rows = []
    for layers in zip(*networks.values(), strict=True):
        name, share = layers[0].name, 100 * layers[0].dense_macs / dense_macs
        cells = [html.Th(name, scope="row"), html.Td(f"{share:.1f}")]
        for layer in layers:
            cells += _layer_cells(layer)
        differ = len({layer.choice for layer in layers}) > 1
        rows.append(html.Tr(cells, className="differs" if differ else ""))
    caption = html.Caption(
        "MACs as a share of the dense layer's, error as predicted for the layer alone"
        + ("; layers in which the two differ are marked" if len(points) > 1 else "")
    )
    head = html.Thead(html.Tr([html.Th(title, scope="col") for title in heads]))
    made = html.Table([caption, head, html.Tbody(rows)])
    frame = html.Div(made, className="scroll", tabIndex=0, role="region", **_label("Layers"))
    return [html.H2("Layer by layer"), *about, frame]


def _layer_cells(layer: LayerShare) -> list[html.Td]:
    error = "-" if layer.error is None else f"{100 * layer.error:.2f}"
    return [html.Td(layer.choice), html.Td(f"{100 * layer.macs_ratio:.1f}"), html.Td(error)]


def troubles(shown: Snapshot) -> list[Any]:
    """Why trials failed, the most frequent reason first."""
    if not shown.failures:
        return [html.H2("Failures"), html.P("No trial has failed.")]
    titles = [
        *(html.Th(name, scope="col") for name in ("Trials", "Last")),
        html.Th("Reason", scope="col", className="text"),
    ]
    heads = html.Thead(html.Tr(titles))
    rows = [
        html.Tr([html.Td(f"{count:,}"), html.Td(str(last)), html.Td(reason, className="text")])
        for reason, count, last in shown.failures[:20]
    ]
    caption = html.Caption("Why trials failed")
    made = html.Table([caption, heads, html.Tbody(rows)])
    frame = html.Div(made, className="scroll", tabIndex=0, role="region", **_label("Reasons of failures"))
    return [html.H2("Failures"), frame]


def commands(study: str, place: str, chosen: Mapping[str, int]) -> list[Any]:
    """What to type to export and evaluate the chosen points."""
    if not chosen:
        return []
    slot, number = sorted(chosen.items())[0]
    lines = [
        f"ranksearch export {study} --trial {number} -o rank_map.json --save-weights compressed.safetensors{place}",
        f"ranksearch evaluate rank_map.json{place}",
    ]
    said = html.P(f"In a terminal, {slot} with its weights, then beside the dense network:")
    return [said, *(html.Pre(line) for line in lines)]
