"""The dashboard's pictures: those of the search, thinned to what a screen can show.

They are transparent and leave text to the page, whose style knows day and night.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dashboards.feed import Snapshot, outcome_of
from ranksearch.drawing import Picture, plotly_json
from ranksearch.plots import front_picture
from ranksearch.trial import Trial

DRAWN = 400
"""Dominated trials that are drawn at most: a picture of more would take the browser longer than a person waits."""
_TICKS = 5
"""Labels that a telephone has room for."""
_DAY_ONLY, _BOTH = "#000000", "#999933"
"""A colour that night would swallow, and what stands for it."""


def front_of(shown: Snapshot, others: Sequence[Snapshot], marked: Mapping[str, int]) -> dict[str, Any]:
    """The front of a study with its dominated trials, the fronts of others, and the points that are ``marked``.

    Args:
        shown: the study.
        others: those drawn beside it.
        marked: letter to the number of a trial of the study, such as ``{"A": 7}``.
    """
    front = {trial.number for trial in shown.front}
    dominated = [t for t in shown.trials.values() if t.state == "COMPLETE" and t.number not in front]
    drawn = thinned(dominated)
    study, line = shown.study, list(shown.front)
    trials = study.trials_frame(sorted([*drawn, *line], key=lambda t: t.number))
    picture = front_picture(
        trials,
        study.front(line),
        dense=study.setting.dense,
        title="",
        budget=study.space.budget,
        baselines={other.study.name: other.study.front(list(other.front)) for other in others},
    )
    made = plain(picture)
    if len(drawn) < len(dominated):
        made["data"][0]["name"] = (
            f"Not on the front (accuracy on search images), {len(drawn)} of {len(dominated):,} drawn"
        )
    found = [(letter, trial) for letter, number in marked.items() if (trial := shown.trials.get(number))]
    found.sort(key=lambda pair: (outcome_of(pair[1]).macs, pair[0]))
    marks = [
        # The cheaper one's letter is to the left, so that the two do not meet between their points.
        _mark(letter, trial, on_front=trial.number in front, left=not i)
        for i, (letter, trial) in enumerate(found)
    ]
    made["layout"]["annotations"] = [*made["layout"].get("annotations", ()), *marks]
    made["layout"]["uirevision"] = study.name  # the reader's zoom outlives an update
    return made


def thinned(trials: Sequence[Trial], limit: int = DRAWN) -> list[Trial]:
    """At most ``limit`` of the trials, so that each one left out lies near one that is drawn.

    One is kept of each cell of a grid over accuracy and MACs, which is made coarser until few enough are left.
    """
    if len(trials) <= limit:
        return list(trials)
    outcomes = [trial.outcome for trial in trials if trial.outcome is not None]
    macs = np.fromiter((one.macs for one in outcomes), float, len(trials))
    places = np.stack([macs, np.fromiter((one.accuracy_search for one in outcomes), float, len(trials))], axis=1)
    low, high = places.min(axis=0), places.max(axis=0)
    scaled = (places - low) / np.maximum(high - low, 1e-12)
    cells, first = 96, list(range(len(trials)))
    while len(first) > limit:
        grid = np.minimum((scaled * cells).astype(int), cells - 1)
        first = np.unique(grid[:, 0] * cells + grid[:, 1], return_index=True)[1].tolist()
        cells = cells * 2 // 3
    return [trials[i] for i in sorted(first)]


def _mark(letter: str, trial: Trial, *, on_front: bool, left: bool) -> dict[str, Any]:
    """A letter at the trial's dot: the front is drawn by the report images, all else by the search images."""
    outcome = outcome_of(trial)
    accuracy = outcome.accuracy if on_front and outcome.accuracy is not None else outcome.accuracy_search
    return {
        "x": outcome.macs / 1e9,
        "y": 100 * accuracy,
        "text": f"<b>{letter}</b>",
        "ax": -22 if left else 22,
        "ay": -30,
        "arrowhead": 2,
        "bordercolor": "#808080",
        "borderpad": 3,
    }


def plain(picture: Picture) -> dict[str, Any]:
    """A picture as Plotly's JSON types, transparent, its title left to the page."""
    if picture.ticks is not None and len(picture.ticks[0]) > _TICKS:
        places, labels = picture.ticks
        step = -(-len(places) // _TICKS)
        picture = replace(picture, ticks=(places[::-step], labels[::-step]))
    found = plotly_json(picture)
    layout = found["layout"]
    for name in ("title", "template"):
        del layout[name]
    layout |= {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 64, "r": 16, "t": 24, "b": 48},
        "hoverlabel": {"namelength": -1},
        "font": {"size": 13, "family": "system-ui, sans-serif"},
    }
    layout["xaxis"] |= {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    layout["yaxis"] |= {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    if not picture.cells:
        layout["xaxis"]["tickangle"] = 0
    for trace in found["data"]:
        for part in (trace.get("line", {}), trace.get("marker", {})):
            if part.get("color") == _DAY_ONLY:
                part["color"] = _BOTH
    return found


def described(trial: Trial, dense: Mapping[str, float]) -> str:
    """One trial in a line of text."""
    outcome = outcome_of(trial)
    report = "" if outcome.accuracy is None else f"{100 * outcome.accuracy:.2f} % (report images), "
    share = 100 * outcome.macs / dense["macs"]
    fidelity = trial.proposal.fidelity
    trained = "" if fidelity == 1 else f", after {100 * fidelity:g} % of the training"
    return (
        f"accuracy {report}{100 * outcome.accuracy_search:.2f} % (search images); {outcome.macs / 1e9:.4g} GMACs, "
        f"{share:.1f} % of dense; {outcome.params:,} parameters; proposed by {trial.proposal.origin}{trained}"
    )
