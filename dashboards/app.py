"""The dashboard: what the page's controls do, from what the feeds have read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, no_update
from dash.exceptions import PreventUpdate

from dashboards import page
from dashboards.feed import Feed, Snapshot
from dashboards.figures import described, front_of, plain
from dashboards.first import FirstLook
from ranksearch import pictures
from ranksearch.drawing import Picture
from ranksearch.errors import RanksearchError
from ranksearch.trial import Trial

_PICTURE_OF = {
    "hypervolume": "Share of the objectives' box that the front dominates, by trials that ended",
    "time": "Share of the objectives' box that the front dominates, by time",
    "ranks": "Ranks of every layer along the front",
    "macs": "MACs by layer of the dense network and the chosen points",
    "sensitivity": "What compressing one layer alone loses",
    "importance": "Which layers decide about the first objective",
    "gates": "Open gates of a funnel run over its steps",
}


def build(feeds: Mapping[str, Feed], *, place: str = "", pause_ms: int = 1000) -> Dash:
    """The dashboard of some studies.

    Args:
        feeds: study's name to what reads it; the first is shown first.
        place: how a command names the storage, `` --storage FOLDER``; empty where commands find it by themselves.
        pause_ms: the page asks for news this often.
    """
    app = FirstLook(feeds, title="ranksearch", update_title="", enable_mcp=False)
    app.layout = page.page(list(feeds), pause_ms=pause_ms)
    _follow(app, feeds)
    _choose(app, feeds)
    _hand_over(app, feeds, place)
    _show_pictures(app, feeds)
    # Day or night is the browser's own affair.
    app.clientside_callback(  # type: ignore[no-untyped-call]
        "function(clicks) { return window.ranksearchTheme(clicks); }",
        Output("theme-now", "children"),
        Input("theme", "n_clicks"),
    )
    return app


def _follow(app: Dash, feeds: Mapping[str, Feed]) -> None:
    # One answer brings the news and the picture: a second question would cost the reader its way there and back. Dash
    # forgets an answer when the same question is put once more before it comes, so the clock waits meanwhile, and the
    # page keeps what it has drawn: what got lost is drawn at the next tick.
    @app.callback(
        Output("progress", "children"),
        Output("versions", "data"),
        Output("front", "figure"),
        Output("drawn", "data"),
        Input("clock", "n_intervals"),
        Input("study", "value"),
        Input("chosen", "data"),
        State("versions", "data"),
        State("drawn", "data"),
        running=[(Output("clock", "disabled"), True, False)],
    )
    def follow(
        _ticks: int | None,
        name: str,
        chosen: Mapping[str, Mapping[str, int]],
        seen: dict[str, int],
        drawn: Mapping[str, Any],
    ) -> tuple[Any, Any, Any, Any]:
        feed, mine = feeds[name], chosen.get(name, {})
        now = {other: one.snapshot.version for other, one in feeds.items()}
        shown, wanted = feed.snapshot, {"versions": now, "study": name, "marked": mine}
        if wanted == drawn and shown.state != "running" and not feed.problem and ctx.triggered_id == "clock":
            raise PreventUpdate
        told = page.progress(shown, feed.problem)
        if wanted == drawn:
            return told, no_update, no_update, no_update
        fresh = no_update if now == seen else now
        return told, fresh, front_of(shown, _others(shown, feeds), mine), wanted

    @app.callback(
        Output("front-table", "children"),
        Output("troubles", "children"),
        Input("versions", "data"),
        Input("study", "value"),
        Input("chosen", "data"),
        prevent_initial_call=True,
    )
    def draw(_seen: Any, name: str, chosen: Mapping[str, Mapping[str, int]]) -> tuple[Any, Any]:
        shown = feeds[name].snapshot
        failures = no_update if ctx.triggered_id == "chosen" else page.troubles(shown)
        return page.front_table(shown, chosen.get(name, {})), failures


def _others(shown: Snapshot, feeds: Mapping[str, Feed]) -> list[Snapshot]:
    """The other studies of the same network and data, whose fronts can be drawn on the same axes."""
    found = [feed.snapshot for feed in feeds.values() if feed.snapshot.study.name != shown.study.name]
    return [one for one in found if shown.study.setting.comparable(one.study.setting)]


def _choose(app: Dash, feeds: Mapping[str, Feed]) -> None:
    @app.callback(
        Output("chosen", "data"),
        Output("pick-answer", "children"),
        Output("front", "clickData"),
        Input("pick", "n_clicks"),
        Input("front", "clickData"),
        Input({"type": "choose", "slot": ALL, "trial": ALL}, "n_clicks"),
        State("study", "value"),
        State("rule", "value"),
        State("amount", "value"),
        State("slot", "value"),
        State("chosen", "data"),
        prevent_initial_call=True,
    )
    def choose(
        _picks: int,
        clicked: Mapping[str, Any] | None,
        _buttons: Sequence[int],
        name: str,
        rule: str,
        amount: float | None,
        slot: str,
        chosen: dict[str, dict[str, int]],
    ) -> tuple[Any, Any, None]:
        cause = ctx.triggered_id
        if cause == "pick":
            try:
                number = _picked(feeds[name].snapshot, rule, amount)
            except (RanksearchError, ValueError) as error:
                return no_update, str(error), None
        elif cause == "front":
            number = _key_of(clicked)
        else:
            # A table that is drawn again has fresh buttons, which nobody pressed.
            if not ctx.triggered[0]["value"]:
                raise PreventUpdate
            slot, number = cause["slot"], cause["trial"]
        trial = feeds[name].snapshot.trials.get(number)
        if trial is None or trial.outcome is None:
            raise PreventUpdate
        changed = {**chosen, name: {**chosen.get(name, {}), slot: number}}
        # The click is forgotten, as only one that differs from the last is heard: the same point may be meant again.
        return changed, f"Point {slot} is trial {number}.", None

    @app.callback(
        Output("details", "children"),
        Output("export-A", "disabled"),
        Output("export-B", "disabled"),
        Input("chosen", "data"),
        Input("study", "value"),
    )
    def show(chosen: Mapping[str, Mapping[str, int]], name: str) -> tuple[Any, bool, bool]:
        shown, mine = feeds[name].snapshot, chosen.get(name, {})
        texts = {slot: described(shown.trials[n], shown.study.setting.dense) for slot, n in mine.items()}
        return page.details(shown, mine, texts), "A" not in mine, "B" not in mine


def _picked(shown: Snapshot, rule: str, amount: float | None) -> int:
    """The number of the trial that a rule picks: as ``ranksearch export`` does it."""
    from ranksearch.export import choose

    if rule == "knee":
        return choose(shown.study, knee_point=True, trials=list(shown.front)).number
    if amount is None:
        raise ValueError("this rule needs a number. Give it in the field below.")
    if rule == "trial":
        return choose(shown.study, trial=int(amount), trials=list(shown.trials.values())).number
    scaled = amount / 100 if rule == "max_macs_ratio" else amount
    return choose(shown.study, **{rule: scaled}, trials=list(shown.front)).number  # type: ignore[arg-type]


def _key_of(clicked: Mapping[str, Any] | None) -> int:
    """The trial of the point that was clicked; -1 for one that stands for none, as the dense network."""
    points = clicked["points"] if clicked else []
    key = points[0].get("customdata") if points else None
    # Points of other studies have the numbers of other trials.
    return int(key) if key is not None and points[0]["curveNumber"] <= 1 else -1


def _hand_over(app: Dash, feeds: Mapping[str, Feed], place: str) -> None:
    @app.callback(Output("commands", "children"), Input("chosen", "data"), Input("study", "value"))
    def tell(chosen: Mapping[str, Mapping[str, int]], name: str) -> Any:
        return page.commands(name, place, chosen.get(name, {}))

    @app.callback(
        Output("download", "data"),
        Output("export-answer", "children"),
        Input("export-A", "n_clicks"),
        Input("export-B", "n_clicks"),
        State("study", "value"),
        State("chosen", "data"),
        prevent_initial_call=True,
    )
    def export(_a: int, _b: int, name: str, chosen: Mapping[str, Mapping[str, int]]) -> tuple[Any, Any]:
        slot = str(ctx.triggered_id).removeprefix("export-")
        shown, number = feeds[name].snapshot, chosen.get(name, {}).get(slot)
        if number is None:
            raise PreventUpdate
        try:
            content = exported(shown, number)
        except RanksearchError as error:
            return no_update, str(error)
        file = "rank_map.json"
        sent = {"content": content.decode(), "filename": file, "type": "application/json"}
        return sent, f"Trial {number} is in {file}, where your browser keeps downloads; its weights are not."


def exported(shown: Snapshot, number: int) -> bytes:
    """The bytes of the file that ``ranksearch export --trial N`` writes."""
    from ranksearch.export import rank_map_of

    with tempfile.TemporaryDirectory() as folder:
        return rank_map_of(shown.study, shown.trials[number]).save(Path(folder, "rank_map.json")).read_bytes()


def _show_pictures(app: Dash, feeds: Mapping[str, Feed]) -> None:
    @app.callback(
        Output("picture", "figure"),
        Output("picture-frame", "aria-label"),
        Output("picture-frame", "style"),
        Output("picture-note", "children"),
        Input("picture-name", "value"),
        Input("versions", "data"),
        Input("study", "value"),
        Input("chosen", "data"),
        prevent_initial_call=True,
    )
    def show(kind: str, _seen: Any, name: str, chosen: Mapping[str, Mapping[str, int]]) -> tuple[Any, ...]:
        cause = ctx.triggered_id
        if (cause == "chosen" and kind not in ("macs", "gates")) or (cause == "versions" and kind in _STILL):
            raise PreventUpdate
        shown = feeds[name].snapshot
        try:
            found = _picture(kind, shown, _others(shown, feeds), chosen.get(name, {}))
        except ValueError as error:
            return _NOTHING, "No picture", _frame(8), str(error)
        drawn = plain(found)
        return drawn, _PICTURE_OF[kind], _frame(max(28, drawn["layout"].pop("height", 0) / 16)), found.title


_STILL = ("macs", "sensitivity", "importance", "gates")
"""Pictures that a trial more does not change, or hardly: they are drawn when they are asked for."""
_NOTHING = {
    "data": [],
    "layout": {"margin": dict.fromkeys("lrtb", 0), "xaxis": {"visible": False}, "yaxis": {"visible": False}},
}


def _frame(height_rem: float) -> dict[str, str]:
    return {"height": f"{height_rem:.1f}rem"}


def _in_order(shown: Snapshot) -> list[Trial]:
    return sorted(shown.trials.values(), key=lambda trial: trial.number)


def _picture(kind: str, shown: Snapshot, others: Sequence[Snapshot], chosen: Mapping[str, int]) -> Picture:
    setting = shown.study.setting
    points = [shown.trials[number] for _, number in sorted(chosen.items()) if number in shown.trials]
    if kind in ("hypervolume", "time"):
        courses = {one.study.name: one.course for one in (shown, *others)}
        return pictures.hypervolume_picture(courses, "trials" if kind == "hypervolume" else "time")
    if kind == "ranks":
        return pictures.ranks_picture(setting, shown.front)
    if kind == "macs":
        return pictures.macs_picture(setting, points)
    if kind == "sensitivity":
        return pictures.sensitivity_picture(setting.table)
    if kind == "importance":
        of = str(shown.study.space.objectives[0])
        return pictures.importance_picture(shown.study.importance(of, _in_order(shown)), of)
    runs = [t for t in (*points, *shown.trials.values()) if t.proposal.funnel and t.outcome is not None]
    if not runs:
        raise ValueError("Gates are those of funnel runs, and this study has none that is complete.")
    return pictures.gates_picture(runs[0])
