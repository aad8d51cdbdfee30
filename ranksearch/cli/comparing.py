"""The command that compares strategies on one network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranksearch.cli.options import AsJson, Quiet, Settings, SpaceFile, Storage, complain, console, say
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import strategies_table, targets_table
from ranksearch.errors import RanksearchError
from ranksearch.secrecy import redacted

if TYPE_CHECKING:
    from ranksearch.comparison import Comparison


def compare(
    context: typer.Context,
    space: SpaceFile,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="A,B,...", help="Strategies; optuna:tpe, knapsack@loss: sampler, price.", show_default=False
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the space's on.")] = 3,
    targets: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Shares of the MACs at which accuracies are compared.")
    ] = "0.7,0.5,0.35",
    fine_tune_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Steps of training that every chosen rank map gets in the end.")
    ] = 0,
    maps: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE,...", help="Rank maps made elsewhere, as a row of this name; repeatable."),
    ] = None,
    settings: Settings = None,
    study: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Begins the studies' names: NAME-STRATEGY-SEED; the space's by default."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the table, and FILE-curves.csv: hypervolumes.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an interactive page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture.")] = None,
    as_json: AsJson = False,
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Compare strategies under one space, with the same budget of trials each; run again, it continues."""
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    shares, files = _shares(targets), _maps(maps or ())
    for file in (csv, html, png):
        if file is not None and not file.resolve().parent.is_dir():
            raise typer.BadParameter(f"{file} must be in a folder that exists")
    with _going_on(context, quiet) as reporter:
        from ranksearch.comparison import compare as run

        found = run(
            space,
            names,
            seeds=seeds,
            targets=shares,
            fine_tune_steps=fine_tune_steps,
            maps=files,
            settings=settings or (),
            storage=storage,
            name=study,
            notify=reporter.notify,
            watch=reporter.watch,
            began=reporter.began,
        )
    written = _written(found, csv, html, png)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        _show(found, written)
    if not any(run.done for run in found.runs):
        complain(f"no trial of {found.name} was scored.")
        raise typer.Exit(1)


def _show(found: Comparison, written: list[Path]) -> None:
    console().print(strategies_table(found))
    say()
    console().print(targets_table(found))
    dense = [run.dense_accuracy for run in found.runs]
    say(f"\nMeans over the seeds ± half the range; report images. Dense: {100 * sum(dense) / len(dense):.2f} %.")
    say("Behind: the best, by so many points ± what the choice of the report images leaves open (95 %).")
    say("In bold: what is no worse beyond chance.")
    for row in found.summary().to_dict("records"):
        if row["reason"]:
            say(f"{row['strategy']}: {row['reason']}", style="yellow")
    if written:
        say(f"Written: {', '.join(map(str, written))}")


def _written(found: Comparison, csv: Path | None, html: Path | None, png: Path | None) -> list[Path]:
    """Write the files asked for; returns them."""
    written = []
    if csv is not None:
        curves = csv.with_name(f"{csv.stem}-curves{csv.suffix}")
        found.frame().to_csv(csv, index=False)
        found.curves().to_csv(curves, index=False)
        written += [csv, curves]
    if html is not None:
        from ranksearch.comparison.pictures import comparison_html

        html.write_text(comparison_html(found), encoding="utf-8")
        written.append(html)
    if png is not None:
        from ranksearch.comparison.pictures import comparison_png

        png.write_bytes(comparison_png(found))
        written.append(png)
    return written


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--targets must be numbers with ',' between, found {text!r}") from error


def _maps(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Row name to files; a name given twice has the files of both."""
    found: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, files = text.partition("=")
        if not equals or not name or not files:
            raise typer.BadParameter(f"--maps must be NAME=FILE[,FILE...], found {text!r}")
        found.setdefault(name, []).extend(Path(file) for file in files.split(","))
    return found


@contextmanager
def _going_on(context: typer.Context, quiet: bool) -> Iterator[Reporter]:
    """Show progress; after Ctrl-C, or an error once trials have run, say how to continue."""
    reporter = Reporter(quiet=quiet)
    try:
        with reporter:
            yield reporter
    except KeyboardInterrupt:
        say("Interrupted: what was tried is kept.", style="yellow", stderr=True)
        say(f"Go on with: {_command(context)}", stderr=True)
        raise typer.Exit(130) from None
    except (RanksearchError, OSError) as error:
        if not reporter.trials:
            raise
        complain(error)
        say(f"Go on with: {_command(context)}", stderr=True)
        raise typer.Exit(1) from None


def _command(context: typer.Context) -> str:
    """The command that was given; what the environment says, as a database's password, it says again."""
    words = ["ranksearch", "compare"]
    for parameter in context.command.params:
        name = parameter.name or ""
        value, source = context.params.get(name), context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or value is False:
            continue
        option = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
        for one in value if isinstance(value, list | tuple) else [value]:
            words += option if one is True else [*option, str(one)]
    return redacted(shlex.join(words))
