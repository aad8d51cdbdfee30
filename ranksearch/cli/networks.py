"""Commands on a rank map and its network: apply, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import AsJson, Storage, console, say
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import comparison_table, percent

_DENSE = "The dense network's weights; those that the map records by default."


def apply(
    rank_map: Annotated[Path, typer.Argument(metavar="RANK_MAP.json", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The compressed weights to write (safetensors).")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Architecture; that of the map by default.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=_DENSE)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE.yaml|FOLDER|recorded",
            help="Calibration images, for activation-aware factors; weight-only without.",
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Decompose a dense network afresh at the ranks of a map."""
    from ranksearch.handover import compress

    with Reporter() as reporter:
        found = compress(
            rank_map, output, model=model, weights=weights, data=data, storage=storage, notify=reporter.notify
        )
    factors = found.provenance["applied_afresh"]
    say(f"{factors} factors: {percent(found.macs_ratio, 1)} % of the MACs, {found.params:,} parameters")
    say(f"Written: {output}")


def evaluate(
    compressed: Annotated[Path, typer.Argument(metavar="RANK_MAP.json|COMPRESSED.safetensors", show_default=False)],
    data: Annotated[
        str,
        typer.Option(metavar="SPACE.yaml|FOLDER|recorded", help="Images; a folder replaces the recorded root."),
    ] = "recorded",
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=_DENSE)] = None,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Show accuracy (report images), GMACs, parameters and latency of dense and compressed side by side."""
    from ranksearch.handover import compare

    with Reporter() as reporter:
        found = compare(compressed, data=data, weights=weights, storage=storage, notify=reporter.notify)
    recorded = found.rank_map.metrics.get("accuracy")
    if as_json:
        report = {
            "dense": found.dense.to_json(),
            "compressed": found.compressed.to_json(),
            "macs_ratio": found.compressed.macs / found.dense.macs,
            "factors": found.factors,
            "recorded_accuracy": recorded,
            "threads": found.threads,
            "same_dense": found.same_dense,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    console().print(comparison_table(found))
    say(f"\n{found.dense.images} report images, {found.threads} CPU thread{'s' if found.threads > 1 else ''}")
    if found.factors == "weight-only":
        say("The map has no weights: decomposed afresh, weight-only, so not the network that the search measured.")
    elif recorded is not None and data == "recorded":
        same = recorded == found.compressed.accuracy
        say(f"The search recorded {percent(recorded)} %: {'the same' if same else 'not the same'}.")
    if not found.same_dense:
        say("The dense weights are not those that the map was searched with.", style="yellow", stderr=True)
