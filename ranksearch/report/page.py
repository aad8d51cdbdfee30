"""The page of a rank map: plain HTML with its style inside, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from ranksearch.data import Data, to_input
from ranksearch.handover import Comparison, compare_pair
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import RankMap
from ranksearch.recorded import RECORDED, read_pair, scoring_of
from ranksearch.report.layers import LayerReport, measure_layers
from ranksearch.scoring import reproducible
from ranksearch.storage import Store
from ranksearch.table import FLOAT_BITS

_IMAGES = 256
"""Calibration images on which the errors of layers are measured."""
_BATCH = 8
"""Of them at a time: the outputs of all replaced layers are held meanwhile."""
_EPOCHS = 12
"""Of a training that are shown at most."""
_SLOWER = 1.05
"""A layer is called slower than dense from this ratio of latencies on: below, a stopwatch may be wrong."""

_STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 84em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3em 0.7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
.bar { display: inline-block; height: 0.7em; background: #0072B2; vertical-align: middle; }
.rest { display: inline-block; height: 0.7em; background: #ddd; vertical-align: middle; }
.worse { color: #D55E00; font-weight: bold; }
.dense td { color: #888; }
code { background: #f3f3f3; padding: 0 0.2em; }
"""


def write_report(
    file: Path,
    output: Path,
    *,
    data: str = RECORDED,
    weights: Path | None = None,
    trust: bool = False,
    storage: str | Path | None = None,
    notify: Notify = silent,
) -> None:
    """Measure both networks of a rank map on this machine, and write the page.

    Args:
        file: the map, whose weights are used where it names them, or compressed weights.
        output: the page.
        data: ``"recorded"`` by the map's search, a space file, or a folder that replaces the recorded root.
        weights: of the dense network; those the map records by default.
        trust: whether functions that the map alone names are imported and called.
        storage: where the cache is.
        notify: told what is being done.

    Raises:
        RankMapError, ModelError, DataError, SpaceError: something cannot be read, or does not fit the map.
    """
    pair = read_pair(file, data=data, weights=weights, cache=Store(storage).cache, notify=notify, trust=trust)
    compared = compare_pair(pair, notify)
    with reproducible(compared.threads):
        batches = _batches(cast(Data, pair.data), pair.rank_map)
        layers = measure_layers(pair.rank_map, pair.dense, pair.compressed, batches, notify)
    output.write_text(page(compared, layers), encoding="utf-8")


def _batches(data: Data, rank_map: RankMap) -> Iterator[Tensor]:
    images = data.calibration[:_IMAGES]
    for start in range(0, len(images), _BATCH):
        yield to_input(images[start : start + _BATCH], data, scoring_of(rank_map)[2])


def page(found: Comparison, layers: Sequence[LayerReport]) -> str:
    """The page as a text."""
    rank_map = found.rank_map
    title = html.escape(f"{rank_map.model.name} at {_percent(rank_map.macs_ratio)} of its MACs")
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<h2>What to expect</h2>
<ul>
{"".join(f"<li>{html.escape(line)}</li>" for line in expectations(found, layers))}
</ul>
<h2>Dense and compressed</h2>
{_side_by_side(found)}
<h2>Layer by layer</h2>
<p>Costs of one image and one call; latency of each layer alone, in milliseconds. Error: norm of the difference of the
layer's outputs from the dense ones, relative to these, on calibration images; alone, given the dense network's inputs,
and in place, given what the compressed network's earlier layers hand down.</p>
{_layer_table(layers)}
{_curves(rank_map)}
<h2>Where it comes from</h2>
{_origin(rank_map)}
</body>
</html>
"""


def expectations(found: Comparison, layers: Sequence[LayerReport]) -> list[str]:
    """What the measurements mean, in sentences."""
    dense, ours = found.dense, found.compressed
    drop = 100 * (dense.accuracy - ours.accuracy)
    lines = [
        f"It names the right class for {_percent(ours.accuracy, 2)} of the {ours.images:,} report images, the dense "
        f"network for {_percent(dense.accuracy, 2)}: {abs(drop):.2f} points {'fewer' if drop >= 0 else 'more'}. By "
        f"chance of the images alone its accuracy may lie anywhere from {_percent(ours.accuracy_low, 2)} to "
        f"{_percent(ours.accuracy_high, 2)}."
    ]
    speeds = ", ".join(
        f"{before / ours.latency_ms[size]:.2f} at batch {size}" for size, before in dense.latency_ms.items()
    )
    threads = f"{found.threads} CPU thread{'s' if found.threads > 1 else ''}"
    lines.append(
        f"It takes {dense.macs / ours.macs:.2f} times fewer MACs and {dense.params / ours.params:.2f} times fewer "
        f"parameters. Measured where this page was made, with {threads}, batch norms folded, it is as many times as "
        f"fast as dense: {speeds}. On another machine, measure again."
    )
    slower = [one.name for one in layers if one.latency_ms > _SLOWER * one.dense_latency_ms]
    if slower:
        lines.append(f"Slower than dense, by themselves, are {', '.join(slower)}: left dense, they would gain time.")
    lost = sorted((one for one in layers if one.error is not None), key=lambda one: -cast(float, one.error))[:3]
    if lost:
        lines.append(
            "The layers that lose most are "
            + ", ".join(f"{one.name} ({_percent(cast(float, one.error))})" for one in lost)
            + "."
        )
    if found.factors == "weight-only":
        lines.append(
            "The map has no weights: the factors were made afresh from the dense weights alone, so this is not the "
            "network that the search measured. Export the map with its weights."
        )
    if not found.same_dense:
        lines.append("The dense weights are not those that the map was searched with.")
    return lines


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _side_by_side(found: Comparison) -> str:
    dense, ours = found.dense, found.compressed
    intervals = [f"{_percent(one.accuracy_low)} to {_percent(one.accuracy_high)}" for one in (dense, ours)]
    rows = [
        ("accuracy, report images", _percent(dense.accuracy, 2), _percent(ours.accuracy, 2), ""),
        ("95 % interval", *intervals, ""),
        ("loss, nats per image", f"{dense.loss:.4f}", f"{ours.loss:.4f}", ""),
        ("MACs per image", f"{dense.macs:,}", f"{ours.macs:,}", f"{ours.macs / dense.macs:.3f}"),
        ("parameters", f"{dense.params:,}", f"{ours.params:,}", f"{ours.params / dense.params:.3f}"),
    ]
    known = found.rank_map.metrics
    if (operations := known.get("bit_operations")) is not None and (size := known.get("weight_bytes")) is not None:
        whole, floats = dense.macs * FLOAT_BITS**2, 4 * dense.params
        rows.append(("bit operations per image", f"{whole:,}", f"{operations:,}", f"{operations / whole:.3f}"))
        rows.append(("weights, bytes", f"{floats:,}", f"{size:,}", f"{size / floats:.3f}"))
    for size, before in dense.latency_ms.items():
        after = ours.latency_ms[size]
        rows.append((f"latency, batch {size}, ms", f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}"))
    return _table(("", "dense", "compressed", "ratio"), [(row, "") for row in rows])


def _layer_table(layers: Sequence[LayerReport]) -> str:
    columns = ("layer", "kernel", "format", "ranks", "MACs", "of dense", "", "parameters", "of dense", "latency",
               "dense", "error alone", "in place")  # fmt: skip
    rows = []
    for one in layers:
        conv = one.conv
        kernel = "x".join(map(str, (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)))
        slower = one.latency_ms > _SLOWER * one.dense_latency_ms
        latency = f"{one.latency_ms:.3f}"
        rows.append(
            (
                (
                    html.escape(one.name) + (f" (runs {one.calls} times)" if one.calls > 1 else ""),
                    kernel,
                    html.escape(one.format) + (f", {one.bits} bits" if one.bits < FLOAT_BITS else ""),
                    ", ".join(map(str, one.ranks)),
                    f"{one.macs:,}",
                    _percent(one.macs / one.dense_macs),
                    _bar(one.macs / one.dense_macs),
                    f"{one.params:,}",
                    _percent(one.params / one.dense_params),
                    f'<span class="worse">{latency}</span>' if slower else latency,
                    f"{one.dense_latency_ms:.3f}",
                    "" if one.error is None else _percent(one.error),
                    "" if one.error_in_place is None else _percent(one.error_in_place),
                ),
                "dense" if one.format == "dense" else "",
            )
        )
    return _table(columns, rows)


def _bar(share: float) -> str:
    filled = min(1.0, share) * 6
    parts = (("bar", filled), ("rest", 6 - filled))
    return "".join(f'<span class="{name}" style="width:{width:.2f}em"></span>' for name, width in parts)


def _table(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    """Cells are HTML already; each row goes with its class."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n' for cells, kind in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _curves(rank_map: RankMap) -> str:
    """The accuracies over the epochs of a fine-tuning, where there was one."""
    curves: Any = rank_map.provenance.get("finetune", {}).get("curves", {})
    rows = []
    for name, curve in curves.items():
        for i in np.linspace(0, len(curve) - 1, min(len(curve), _EPOCHS)).round().astype(int):
            epoch = curve[i]
            averaged = epoch["accuracy_ema"]
            cells = (
                html.escape(name),
                str(epoch["epoch"]),
                f"{epoch['loss']:.4f}",
                _percent(epoch["accuracy"], 2),
                "" if averaged is None else _percent(averaged, 2),
            )
            rows.append((cells, ""))
    if not rows:
        return ""
    columns = ("network", "epoch", "training loss", "accuracy, search images", "of the average")
    return f"<h2>Fine-tuning</h2>\n{_table(columns, rows)}"


def _origin(rank_map: RankMap) -> str:
    known = rank_map.provenance
    facts = {
        "study": known.get("study"),
        "trial": known.get("trial"),
        "proposed by": known.get("origin"),
        "seed": known.get("seed"),
        "dense weights, hash": rank_map.model.weights_sha256,
        "data": known.get("data", {}).get("source"),
        "accuracy that was recorded": rank_map.metrics.get("accuracy"),
        **{f"version of {name}": version for name, version in known.get("versions", {}).items()},
    }
    rows = [((html.escape(k), html.escape(str(v))), "") for k, v in facts.items() if v is not None]
    return _table(("", ""), rows)
