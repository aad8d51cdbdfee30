"""Commands on a network, with a rank map or without: decompose, apply, evaluate, report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import AsJson, Storage, Trust, console, say
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import comparison_table, decomposition_table, percent

_MODEL = "Architecture, or a space file: its calibration images make the factors activation-aware."
_DENSE = "The dense network's weights; those that the map records by default."


def decompose(
    model: Annotated[str, typer.Option(metavar="NAME|SPACE.yaml", help=_MODEL, show_default=False)],
    layer: Annotated[str, typer.Option(metavar="NAME", help="The module's name.", show_default=False)],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="The pretrained weights.")] = None,
    format: Annotated[str | None, typer.Option(metavar="NAME", help="One format, at --rank.")] = None,
    rank: Annotated[str | None, typer.Option(metavar="R[,R...]", help="Its ranks, e.g. 16,24 for tucker2.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html|FILE.png", help="Draw error against MACs for all formats.")
    ] = None,
    stabilise: Annotated[
        str | None, typer.Option(metavar="METHOD", help="epc, norms, bounded or none; that of the space by default.")
    ] = None,
    input: Annotated[str | None, typer.Option(metavar="CxHxW", help="Size of an image, e.g. 3x32x32.")] = None,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Decompose one layer: error, sensitivity, MACs and time, at given ranks or for all formats."""
    from pydantic import ValidationError

    from ranksearch.layerwise import decompose_layer
    from ranksearch.space import StabiliseSpec

    ranks = None if rank is None else _integers(rank, "--rank", ",")
    shape = None if input is None else _integers(input, "--input", "x")
    if shape is not None and len(shape) != 3:
        raise typer.BadParameter(f"--input must be channels x height x width, found {input}")
    if (format is None) != (rank is None):
        raise typer.BadParameter("--format and --rank go together; without both, all formats are shown")
    if plot is not None and plot.suffix not in (".html", ".png"):
        raise typer.BadParameter(f"--plot must end in .html or .png, found {plot}")
    try:
        method = None if stabilise is None else StabiliseSpec(method=stabilise)
    except ValidationError as error:
        raise typer.BadParameter(f"--stabilise must be epc, norms, bounded or none, found {stabilise}") from error
    with Reporter() as reporter:
        found = decompose_layer(
            model,
            layer,
            weights=weights,
            form=format,
            ranks=ranks,
            formats=() if format is not None and plot is None else None,
            stabilise=method,
            input_shape=shape,
            storage=storage,
            notify=reporter.notify,
        )
    if plot is not None:
        from ranksearch.plots import errors_html, errors_png

        errors_html(found, plot) if plot.suffix == ".html" else errors_png(found, plot)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    conv = found.conv
    say(
        f"{layer}: {conv.in_channels} to {conv.out_channels} channels, kernel "
        f"{'x'.join(map(str, conv.kernel))}, {conv.macs:,} MACs, {conv.params:,} parameters; {found.kind} factors\n"
    )
    console().print(decomposition_table(found))
    for name, reason in found.refused.items():
        say(f"{name} is left out: {reason}", style="dim")
    if plot is not None:
        say(f"Written: {plot}")


def _integers(text: str, option: str, separator: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError as error:
        raise typer.BadParameter(
            f"{option} must be whole numbers with {separator!r} between, found {text!r}"
        ) from error


def apply(
    rank_map: Annotated[Path, typer.Argument(metavar="RANK_MAP.json|COMPRESSED.safetensors", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; compressed weights without --to.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="safetensors, pt2 (torch.export), pt2-int8, onnx, onnx-int8, or python (a module that imports torch "
            "alone): a network that runs, of the map's own weights where it has them, read back and compared, with a "
            "manifest.",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE.yaml|FOLDER|recorded|noise",
            help="With --to: what the export is compared on. Default: --data, or the recorded data.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Architecture; that of the map by default.")] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=_DENSE)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE.yaml|FOLDER|recorded",
            help="Calibration images: decompose afresh, with activation-aware factors; weight-only without.",
        ),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Decompose a dense network afresh at the ranks of a map; or, with --to, export the compressed network."""
    if to is None:
        if images is not None or as_json:
            raise typer.BadParameter("--images and --json go with --to")
        _decomposed(rank_map, output, model=model, weights=weights, data=data, storage=storage, trust=trust)
        return
    from ranksearch.deployment import deploy

    with Reporter() as reporter:
        found = deploy(
            rank_map,
            output,
            to=to,
            images=images,
            model=model,
            weights=weights,
            data=data,
            storage=storage,
            trust=trust,
            notify=reporter.notify,
        )
    if as_json:
        typer.echo(found.manifest.read_text(encoding="utf-8"))
        return
    agreement = found.agreement
    afresh = found.rank_map.provenance.get("applied_afresh")
    say(f"{f'{afresh} factors, decomposed afresh' if afresh else 'stored weights'}: {found.macs:,} MACs")
    say(
        f"read back, on {agreement.images:,} images ({agreement.source}): the same class for "
        f"{percent(agreement.top1_agreement)} %, outputs within {agreement.max_difference:.2g}"
    )
    if agreement.accuracy is not None:
        before = percent(agreement.accuracy_before)
        say(f"accuracy on these images: {percent(agreement.accuracy)} %, of the network it was made from {before} %")
    times = ", ".join(f"{value:.3f} ms at batch {size}" for size, value in agreement.latency_ms.items())
    say(f"latency: {times} ({agreement.threads} CPU thread{'s' if agreement.threads > 1 else ''})")
    for file in (*found.files, found.manifest):
        say(f"Written: {file}")


def _decomposed(
    rank_map: Path,
    output: Path,
    *,
    model: str | None,
    weights: Path | None,
    data: str | None,
    storage: str | None,
    trust: bool,
) -> None:
    """Compressed weights, decomposed afresh."""
    from ranksearch.handover import compress

    with Reporter() as reporter:
        found = compress(
            rank_map,
            output,
            model=model,
            weights=weights,
            data=data,
            storage=storage,
            trust=trust,
            notify=reporter.notify,
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
    trust: Trust = False,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Show accuracy (report images), GMACs, parameters and latency of dense and compressed side by side."""
    from ranksearch.handover import compare

    with Reporter() as reporter:
        found = compare(compressed, data=data, weights=weights, storage=storage, trust=trust, notify=reporter.notify)
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
        made = found.rank_map.provenance
        if recorded is not None and {"study", "trial"} <= made.keys():
            which = f"{shlex.quote(str(made['study']))} --trial {made['trial']}"
            say(f"That one, with {percent(recorded)} %, comes with its weights:")
            say(f"  ranksearch export {which} -o rank_map.json --save-weights compressed.safetensors")
    elif recorded is not None and data == "recorded":
        same = recorded == found.compressed.accuracy
        say(f"The search recorded {percent(recorded)} %: {'the same' if same else 'not the same'}.")
    if not found.same_dense:
        say("The dense weights are not those that the map was searched with.", style="yellow", stderr=True)


def report(
    rank_map: Annotated[Path, typer.Argument(metavar="RANK_MAP.json|COMPRESSED.safetensors", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.")],
    data: Annotated[
        str,
        typer.Option(metavar="SPACE.yaml|FOLDER|recorded", help="Images; a folder replaces the recorded root."),
    ] = "recorded",
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=_DENSE)] = None,
    trust: Trust = False,
    storage: Storage = None,
) -> None:
    """Write one page: dense and compressed side by side, layer by layer, and what to expect."""
    if output.suffix != ".html" or not output.resolve().parent.is_dir():
        raise typer.BadParameter(f"--output must be an .html file in a folder that exists, found {output}")
    from ranksearch.report import write_report

    with Reporter() as reporter:
        write_report(rank_map, output, data=data, weights=weights, trust=trust, storage=storage, notify=reporter.notify)
    say(f"Written: {output}")
