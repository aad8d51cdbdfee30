"""Studies, fronts and layers as tables for people and as records for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ranksearch.trial import NORMAL

if TYPE_CHECKING:
    import pandas as pd

    from ranksearch.comparison import Comparison as Strategies
    from ranksearch.handover import Comparison
    from ranksearch.latency import LatencyTable
    from ranksearch.layerwise import Decomposition
    from ranksearch.setting import Setting
    from ranksearch.study import Study
    from ranksearch.surgery import Layer

_WHOLE = ("number", "index", "attempt", "trial", "macs", "params", "seeds", "done", "failed")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts of JSON types: NaN is null, counts are whole numbers."""
    return [{str(key): _plain(str(key), value) for key, value in row.items()} for row in frame.to_dict("records")]


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(value) if name in _WHOLE and value is not None else value


def table(*columns: str, left: int = 0) -> Table:
    """An empty table whose first ``left`` columns are text, the others numbers."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", no_wrap=i >= left)
    return made


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def front_table(study: Study) -> Table:
    """The front, the dense network last."""
    columns = ["trial", "accuracy %", "95 % interval", "search %", "MACs %", "GMACs", "params", "origin"]
    timed, few = study.setting.table.timing is not None, study.space.quantise is not None
    made = table(*columns[:-1], *(["bit ops %", "kB"] if few else []), *(["ms"] if timed else []), columns[-1])
    whole = study.setting.table.dense_bit_operations
    for row in records(study.front()):
        low, high = percent(row["accuracy_low"], 1), percent(row["accuracy_high"], 1)
        made.add_row(
            str(row["trial"]),
            percent(row["accuracy"]),
            f"{low} - {high}",
            percent(row["accuracy_search"]),
            percent(row["macs_ratio"], 1),
            f"{row['gmacs']:.4g}",
            f"{row['params']:,}",
            *([percent(row["bit_operations"] / whole, 2), f"{row['weight_bytes'] / 1e3:,.1f}"] if few else []),
            *([f"{row['latency_ms']:.4g}"] if timed else []),
            row["origin"],
        )
    dense = study.setting.dense
    scores = (percent(dense["accuracy"]), "", percent(dense["accuracy_search"]))
    costs = ["100.0", f"{dense['macs'] / 1e9:.4g}", f"{int(dense['params']):,}"]
    costs += ["100.00", f"{4 * dense['params'] / 1e3:,.1f}"] if few else []
    costs += [f"{dense['latency_ms']:.4g}"] if timed else []
    made.add_row("dense", *scores, *costs, "", style="dim")
    return made


def trials_table(study: Study) -> Table:
    """Every trial with its state and reason."""
    made = table("trial", "state", "origin", "front", "search %", "MACs %", "params", "seconds", "reason")
    for column in (1, 2, 8):
        made.columns[column].justify = "left"
    made.columns[8].no_wrap = False
    for row in records(study.trials_frame()):
        complete = row["accuracy_search"] is not None
        rung = "" if row["fidelity"] == 1 else f"{percent(row['fidelity'], 0)} % of the training"
        infeasible = complete and not row["feasible"]
        made.add_row(
            str(row["number"]),
            row["state"],
            row["origin"],
            "*" if row["on_front"] else "",
            percent(row["accuracy_search"]),
            percent(row["macs_ratio"], 1),
            f"{row['params']:,}" if complete else "-",
            f"{row['seconds']:.1f}" if complete else "-",
            row["reason"] or rung or ("outside the budget's limits" if infeasible else ""),
        )
    return made


def inspection(setting: Setting, layers: list[Layer]) -> dict[str, Any]:
    """What a search would start from, as JSON types; ``layers`` are all of the network's, in order of execution."""
    searched = {layer.name: layer for layer in setting.table.layers}
    pinned = {name: candidate for name, _, candidate in setting.table.pinned}
    rows = []
    for layer in layers:
        conv, choices = layer.conv, searched.get(layer.name)
        row: dict[str, Any] = {
            "name": layer.name,
            "type": "linear" if conv.linear else "conv",
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel": list(conv.kernel),
            "stride": list(conv.stride),
            "groups": conv.groups,
            "output_size": list(conv.output_size),
            "macs": conv.macs * layer.calls,
            "params": conv.params,
            "searched": choices is not None,
            "candidates": 1 if choices is None else len(choices.candidates),
            "formats": dict(Counter(c.format for c in choices.candidates if not c.dense)) if choices else {},
            "reason": None if choices else setting.left_dense.get(layer.name),
        }
        if layer.name in pinned:
            row["fixed"] = {"format": pinned[layer.name].format, "ranks": list(pinned[layer.name].ranks)}
        rows.append(row)
    return {
        "model": setting.model.name,
        "input_shape": list(setting.model.input_shape),
        "dense": dict(setting.dense),
        "least_macs": setting.table.least_macs,
        "rank_maps": str(setting.table.size),
        "layers": rows,
    }


def latencies_table(found: LatencyTable, checks: Sequence[tuple[float, float, float]]) -> Table:
    """Whole networks, predicted and measured: the dense one, and random rank maps."""
    made = table("network", "MACs %", "predicted ms", "measured ms", "error %", "times faster", left=1)
    made.add_row("dense", "100.0", "", f"{found.dense_ms:.4g}", "", "1.00")
    for ratio, predicted, measured in checks:
        error = percent(predicted / measured - 1, 1)
        faster = f"{found.dense_ms / measured:.2f}"
        made.add_row("random ranks", percent(ratio, 1), f"{predicted:.4g}", f"{measured:.4g}", error, faster)
    return made


def layers_table(found: dict[str, Any]) -> Table:
    """The layers of an inspection."""
    made = table("layer", "kernel", "output", "MACs", "MACs %", "params", "candidates", "searched", left=2)
    made.columns[7].justify = "left"
    for row in found["layers"]:
        kernel = "x".join(map(str, [row["out_channels"], row["in_channels"] // row["groups"], *row["kernel"]]))
        how = ", ".join(f"{name} {count}" for name, count in row["formats"].items())
        if "fixed" in row:
            how = f"fixed to {row['fixed']['format']} {tuple(row['fixed']['ranks'])}"
        made.add_row(
            row["name"],
            kernel if max(row["stride"]) == 1 else f"{kernel} /{row['stride'][0]}",
            "x".join(map(str, row["output_size"])),
            f"{row['macs']:,}",
            percent(row["macs"] / found["dense"]["macs"], 1),
            f"{row['params']:,}",
            str(row["candidates"]),
            how or f"stays dense: {row['reason']}",
            style=None if row["searched"] else "dim",
        )
    return made


def comparison_table(found: Comparison) -> Table:
    """Dense and compressed side by side."""
    made = table("", "dense", "compressed", "ratio", left=1)
    dense, ours = found.dense, found.compressed
    made.add_row("accuracy %", percent(dense.accuracy), percent(ours.accuracy), "")
    intervals = [f"{percent(one.accuracy_low)} - {percent(one.accuracy_high)}" for one in (dense, ours)]
    made.add_row("95 % interval", *intervals, "")
    made.add_row("loss", f"{dense.loss:.4f}", f"{ours.loss:.4f}", "")
    made.add_row("GMACs", f"{dense.macs / 1e9:.4g}", f"{ours.macs / 1e9:.4g}", f"{ours.macs / dense.macs:.3f}")
    made.add_row("MACs", f"{dense.macs:,}", f"{ours.macs:,}", "")
    made.add_row("params", f"{dense.params:,}", f"{ours.params:,}", f"{ours.params / dense.params:.3f}")
    for size, before in dense.latency_ms.items():
        after = ours.latency_ms[size]
        made.add_row(f"latency ms, batch {size}", f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}")
    return made


def strategies_table(found: Strategies) -> Table:
    """A comparison's searches: how many trials, how far they came, how long they took; means over the seeds."""
    made = table("strategy", "seeds", "trials", "failed", "hypervolume", "trials, minutes", "wall, minutes", left=1)
    for row in records(found.summary()):
        searched = row["seeds"] > 0
        made.add_row(
            row["strategy"],
            str(row["seeds"]),
            str(row["done"]),
            str(row["failed"]),
            _plus_minus(row["hypervolume"], row["hypervolume_half_range"], 1, 4),
            f"{row['minutes']:.2f}" if searched else "-",
            f"{row['wall_minutes']:.2f}" if searched else "-",
        )
    return made


def targets_table(found: Strategies) -> Table:
    """What the strategies of a comparison have within each target; means over the seeds.

    In bold, of the last accuracies: the best, and what is no worse beyond chance.
    """
    columns = ["within %", "strategy", "MACs %", "accuracy %", *(["trained %"] if found.fine_tune_steps else [])]
    made = table(*columns, "behind", "", left=0)
    made.columns[1].justify = "left"
    rows = records(found.summary())
    for target in found.targets:
        for i, row in enumerate(rows):
            name, seeds = f"{target:g}", row["seeds"]
            times = ("before", "after") if found.fine_tune_steps else ("before",)
            scores = [_plus_minus(row[f"{when}_{name}"], row[f"{when}_half_range_{name}"], 100, 2) for when in times]
            less, error = row[f"{times[-1]}_behind_{name}"], row[f"{times[-1]}_behind_error_{name}"]
            wide = None if error is None else NORMAL * error
            level = less is not None and wide is not None and less <= wide
            last, behind = Text(scores.pop(), style="bold" if level else ""), _plus_minus(less, wide, 100, 2)
            some = f"{row[f'found_{name}']} of {seeds} seeds" if 0 < row[f"found_{name}"] < seeds else ""
            first = percent(target, 1) if i == 0 else ""
            made.add_row(first, row["strategy"], percent(row[f"macs_ratio_{name}"], 1), *scores, last, behind, some)
    return made


def _plus_minus(mean: float | None, half_range: float | None, scale: int, digits: int) -> str:
    """A mean and half the range, a dash where there is none."""
    if mean is None or half_range is None:
        return "-"
    return f"{scale * mean:.{digits}f} ± {scale * half_range:.{digits}f}"


def decomposition_table(found: Decomposition) -> Table:
    """One layer in several formats: the one asked for, or by format and rising MACs."""
    made = table("format", "ranks", "MACs", "MACs %", "params", "error %", "sensitivity", "largest term", "ms", left=2)
    for row in [found.chosen] if found.chosen else found.rows:
        made.add_row(
            row.format,
            ", ".join(map(str, row.ranks)),
            f"{row.macs:,}",
            percent(row.macs_ratio, 1),
            f"{row.params:,}",
            percent(row.relative_error),
            f"{row.sensitivity:.4g}",
            "-" if row.degeneracy is None else f"{row.degeneracy:.2f}",
            f"{1000 * row.seconds:.1f}",
        )
    return made
