"""What the browser shows before its scripts have run: the front of the first study, as SVG in the page itself.

Plotly alone takes a slow machine seconds to load. The page's script takes this away once Plotly has drawn.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil, floor, isfinite, log10
from typing import Any

from dash import Dash

from dashboards.feed import Feed
from dashboards.figures import front_of
from dashboards.page import title

_WIDTH, _HEIGHT = 900, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 24, 72


class FirstLook(Dash):
    """An app whose page holds the front already.

    Args:
        feeds: as :func:`dashboards.app.build` takes them.
        options: of Dash.
    """

    def __init__(self, feeds: Mapping[str, Feed], **options: Any) -> None:
        super().__init__("dashboards", **options)
        self._feeds = feeds

    def interpolate_index(self, **parts: Any) -> str:  # type: ignore[override]
        """The page's HTML; Dash's own hook."""
        shown = next(iter(self._feeds.values())).snapshot
        told = f"{shown.done:,} of {shown.total:,} trials"
        look = (
            f'<div id="first-look" aria-hidden="true"><header><h1>{html.escape(title([*self._feeds]))}</h1></header>'
            f'<main><section class="card"><h2>Front of accuracy against MACs</h2><p class="hint">{told}. Loading …</p>'
            f"{svg(front_of(shown, (), {}))}</section></main></div>"
        )
        whole = {**parts, "app_entry": look + parts["app_entry"]}
        return str(super().interpolate_index(**whole))  # type: ignore[no-untyped-call]


def svg(drawn: Mapping[str, Any]) -> str:
    """Dots and lines of a figure in Plotly's JSON types, of two numeric axes, as SVG that takes the text's colour."""
    traces, layout = drawn["data"], drawn["layout"]
    points = [
        [pair for pair in zip(trace["x"], trace["y"], strict=True) if all(map(isfinite, pair))] for trace in traces
    ]
    across = _Axis([x for pairs in points for x, _ in pairs], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([y for pairs in points for _, y in pairs], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(layout, across, up)]
    for trace, pairs in zip(traces, points, strict=True):
        dots = [(across(x), up(y)) for x, y in pairs]
        colour = trace["marker"]["color"]
        if "line" in trace and dots:
            path = [dots[0]]
            for before, dot in pairwise(dots):
                path += [(dot[0], before[1]), dot] if trace["line"].get("shape") == "hv" else [dot]
            places = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
            parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        size = trace["marker"].get("size", 8) / 2
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>' for x, y in dots)
        hollow = trace["marker"].get("symbol", "").endswith("-open")
        parts.append(f'<g fill="{"none" if hollow else colour}" stroke="{colour}">{circles}</g>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="13" fill="currentColor">{"".join(parts)}</svg>'


class _Axis:
    """From values to places: the values' range, with a margin, over the space between two places."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 1.0
        self.low, self.high = low - margin, high + margin
        self._start, self._step = start, (end - start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) * self._step


def _grid(layout: Mapping[str, Any], across: _Axis, up: _Axis) -> Iterator[str]:
    """Lines at the ticks with their labels, and the axes' titles."""
    bottom, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
    line = '<path d="M{} {}L{} {}" stroke="currentColor" stroke-opacity="0.2"/>'
    for value, label in zip(layout["xaxis"].get("tickvals", ()), layout["xaxis"].get("ticktext", ()), strict=True):
        if across.low <= value <= across.high:
            x = round(across(value), 1)
            yield line.format(x, _TOP, x, bottom)
            for i, text in enumerate(label.split("<br>")):
                yield f'<text x="{x}" y="{bottom + 18 + 15 * i}" text-anchor="middle">{html.escape(text)}</text>'
    step = 10 ** floor(log10(up.high - up.low))
    step /= next(parts for parts in (1, 2, 5) if (up.high - up.low) / step * parts >= 4)
    for i in range(ceil(up.low / step), floor(up.high / step) + 1):
        value, y = i * step, round(up(i * step), 1)
        yield line.format(_LEFT, y, _WIDTH - _RIGHT, y)
        yield f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>'
    below, beside = (html.escape(layout[axis]["title"]["text"]) for axis in ("xaxis", "yaxis"))
    yield f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{below}</text>'
    turned = f'transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">{beside}</text>'
