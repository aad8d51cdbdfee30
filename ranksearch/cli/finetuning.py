"""The command that trains the network of a rank map to the end."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranksearch.cli.options import AsJson, Quiet, Storage, Trust, console, say
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import percent, table

if TYPE_CHECKING:
    from ranksearch.finetuning import FineTuned
    from ranksearch.retraining import Epoch
    from ranksearch.space import FineTuneSpec

_ROWS = {
    "dense": "dense",
    "baseline": "dense, trained alike",
    "before": "compressed, before",
    "after": "compressed, after",
}

_Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="CPU threads of training; PyTorch's by default, with --workers 1 each."),
]
_Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Train on Ray, each batch split among N workers; without it in here."),
]
_Gpus = Annotated[int, typer.Option(min=0, max=1, help="0: workers train on CPUs.")]
_Address = Annotated[
    str, typer.Option(metavar="local|auto|HOST:PORT", help="Ray of the workers; local starts one here.")
]


def finetune(
    rank_map: Annotated[Path, typer.Argument(metavar="RANK_MAP.json|COMPRESSED.safetensors", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New rank map (.json); its weights go beside it.")],
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 60,
    batch_images: Annotated[int, typer.Option(metavar="N", help="Images of a batch.")] = 128,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Largest of the cosine.")] = 0.02,
    weight_decay: Annotated[float, typer.Option(metavar="SHARE", help="Of kernels.")] = 5e-4,
    distill: Annotated[
        float, typer.Option(metavar="SHARE", help="Weight of the dense network's outputs; the rest weighs the labels.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Softening of the outputs in distillation.")] = 2.0,
    ema: Annotated[
        float, typer.Option(min=0, max=0.99999, metavar="DECAY", help="Of the average of the weights; 0: none.")
    ] = 0.999,
    precision: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16", help="bfloat16 is mixed precision.")
    ] = "auto",
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Train the dense network on the same schedule too, for a fair drop.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of batches and their changes.")] = 0,
    threads: _Threads = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")] = "auto",
    workers: _Workers = None,
    gpus_per_worker: _Gpus = 0,
    address: _Address = "local",
    data: Annotated[
        str, typer.Option(metavar="SPACE.yaml|FOLDER|recorded", help="Images; a folder replaces the recorded root.")
    ] = "recorded",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The dense network's; those that the map records by default.")
    ] = None,
    experiment: Annotated[str, typer.Option(metavar="NAME", help="MLflow experiment.")] = "ranksearch",
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow server or database; a file beside the studies by default.")
    ] = None,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Write no MLflow run.")] = False,
    as_json: AsJson = False,
    trust: Trust = False,
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Train a compressed network to the end; after a kill, the same command goes on from the last epoch."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be auto, cpu or cuda, found {device}")
    if workers is None and (gpus_per_worker or address != "local"):
        raise typer.BadParameter("--gpus-per-worker and --address are those of workers, found none. Give --workers")
    if workers is not None and device != "auto":
        raise typer.BadParameter(f"with --workers, --gpus-per-worker decides, found --device {device}. Leave it out")
    spec = _spec(
        epochs=epochs,
        batch_images=batch_images,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        distill=distill,
        temperature=temperature,
        dtype=precision,
    )
    from ranksearch.finetuning import Workers
    from ranksearch.finetuning import finetune as run
    from ranksearch.space import TrackingSpec

    with Reporter(quiet=quiet) as reporter:
        found = run(
            rank_map,
            output,
            spec=spec,
            ema_decay=ema,
            baseline=baseline,
            seed=seed,
            threads=threads,
            device=device,  # type: ignore[arg-type]
            workers=None if workers is None else Workers(count=workers, gpus=gpus_per_worker, address=address),
            data=data,
            weights=weights,
            trust=trust,
            tracking=None if no_tracking else TrackingSpec(uri=tracking_uri, experiment=experiment),
            storage=storage,
            notify=reporter.notify,
            watch=lambda name, epoch: None if quiet else _epoch(name, epoch),
        )
    if as_json:
        typer.echo(json.dumps(_report(found), indent=2, allow_nan=False))
        return
    _show(found)


def _spec(**fields: Any) -> FineTuneSpec:
    from pydantic import ValidationError

    from ranksearch.space import FineTuneSpec

    try:
        # So long a training finds its statistics and factors anew.
        return FineTuneSpec(optimiser="sgd", batch_norm="batch", **fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("dtype", "precision").replace("_", "-")
        raise typer.BadParameter(f"--{name}: {first['msg']}, found {first['input']}") from error


def _epoch(name: str, epoch: Epoch) -> None:
    averaged = "" if epoch.accuracy_ema is None else f", averaged {percent(epoch.accuracy_ema)} %"
    say(
        f"{name} epoch {epoch.epoch}: loss {epoch.loss:.4f}, search images {percent(epoch.accuracy)} %{averaged}",
        stderr=True,
    )


def _report(found: FineTuned) -> dict[str, Any]:
    return {
        "scores": {name: asdict(one) for name, one in found.scores.items()},
        "curves": {name: [asdict(epoch) for epoch in curve] for name, curve in found.curves.items()},
        "report_images": found.report_images,
        "macs_ratio": found.rank_map.macs_ratio,
        "files": [str(file) for file in found.files],
    }


def _show(found: FineTuned) -> None:
    made = table("", "accuracy %", "95 % interval", "search %", left=1)
    for name, title in _ROWS.items():
        if name in found.scores:
            one = found.scores[name]
            between = f"{percent(one.accuracy_low)} - {percent(one.accuracy_high)}"
            made.add_row(title, percent(one.accuracy), between, percent(one.accuracy_search))
    console().print(made)
    say(f"\n{found.report_images} report images; {percent(found.rank_map.macs_ratio, 1)} % of the MACs")
    for file in found.files:
        say(f"Written: {file}")
