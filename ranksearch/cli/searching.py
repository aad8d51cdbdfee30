"""Commands around a search space: inspect, search, resume, schema."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranksearch.cli.options import (
    AsJson,
    AsJsonLines,
    Quiet,
    Settings,
    SpaceFile,
    Storage,
    StudyName,
    complain,
    console,
    say,
)
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import front_table, inspection, latencies_table, layers_table, percent, records
from ranksearch.errors import RanksearchError
from ranksearch.secrecy import redacted
from ranksearch.trial import LIMITS

if TYPE_CHECKING:
    from ranksearch.study import Study
    from ranksearch.trial import Trial


def inspect(
    space: SpaceFile,
    settings: Settings = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Show the layers, their shapes and MACs, which are searched and over how many candidates; runs no trial.

    The built-in digits network is trained on first use, in seconds.
    """
    from ranksearch.launch import inspect as examine
    from ranksearch.models import build_model
    from ranksearch.surgery import find_layers

    with Reporter() as reporter:
        setting = examine(space, settings=settings or (), storage=storage, notify=reporter.notify)
    model = build_model(setting.space.model, weights=None)
    found = inspection(setting, find_layers(model, setting.model.input_shape))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console().print(layers_table(found))
    dense, least = found["dense"], found["least_macs"]
    scores = percent(dense["accuracy"]), percent(dense["accuracy_search"])
    searched = sum(row["searched"] for row in found["layers"])
    shape = "x".join(str(size) for size in found["input_shape"])
    say(
        f"\n{found['model']} on {shape} images: {dense['macs'] / 1e9:.4g} GMACs, {int(dense['params']):,} parameters, "
        f"accuracy {scores[0]} % (report images), {scores[1]} % (search images)"
    )
    say(
        f"{searched} of {len(found['layers'])} layers searched, {float(found['rank_maps']):.2g} rank maps, "
        f"the cheapest with {percent(least / dense['macs'], 1)} % of the MACs"
    )


def latency(
    space: SpaceFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.json", help="Where the latencies go.", show_default=False)
    ],
    networks: Annotated[
        int, typer.Option(min=0, help="Random rank maps whose networks are built and timed, to check predictions.")
    ] = 5,
    settings: Settings = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Measure how long every candidate takes on this machine: for `latency.table` of a space, here or elsewhere."""
    from ranksearch.launch import time_candidates

    with Reporter() as reporter:
        found, checks = time_candidates(
            space, settings=settings or (), networks=networks, storage=storage, notify=reporter.notify
        )
    found.save(output)
    if as_json:
        rows = [dict(zip(("macs_ratio", "predicted_ms", "measured_ms"), check, strict=True)) for check in checks]
        names = ("device", "runtime", "batch_images", "threads", "dense_ms")
        typer.echo(json.dumps({**{name: getattr(found, name) for name in names}, "networks": rows}, indent=2))
        return
    console().print(latencies_table(found, checks))
    say(
        f"\n{len(found.layers_ms)} candidates on {found.device}, {found.runtime}, batch {found.batch_images}, "
        f"{found.threads} thread{'s' if found.threads > 1 else ''}. Written: {output}"
    )
    say("Use it: --set objectives=[accuracy,latency] --set latency.table=" + shlex.quote(str(output)))


def search(
    space: SpaceFile,
    settings: Settings = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the new study; that of the space by default.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Where there is a study of that name, go on with it instead.")
    ] = False,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: AsJsonLines = False,
) -> None:
    """Search the ranks of a network; ends with the front and the commands to go on."""
    if go_on and (known := _known(space, settings or (), study, storage)) is not None:
        name, trials = known
        resume(name, trials=trials, storage=storage, quiet=quiet, as_json=as_json)
        return
    with _driving(storage, quiet, as_json) as reporter:
        from ranksearch.launch import search as run

        found = run(
            space,
            settings=settings or (),
            storage=storage,
            name=study,
            notify=reporter.notify,
            named=reporter.named,
            watch=reporter.watch,
        )
    _conclude(found, storage, as_json)


def resume(
    name: StudyName,
    trials: Annotated[
        int | None, typer.Option(min=1, help="New number of trials in all, to extend the search.", show_default=False)
    ] = None,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: AsJsonLines = False,
) -> None:
    """Continue a stopped or killed search; with a larger --trials, extend a finished one."""
    with _driving(storage, quiet, as_json) as reporter:
        from ranksearch.launch import resume as run

        reporter.named(name)
        found = run(name, storage=storage, trials=trials, notify=reporter.notify, watch=reporter.watch)
    if not reporter.trials and not as_json:
        made = len({trial.index for trial in found.trials()})
        say(f"Nothing to do: {made} proposals are made already. Ask for more with --trials.\n")
    _conclude(found, storage, as_json)


def schema() -> None:
    """Print the JSON Schema of a space file, for editors."""
    from ranksearch.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _known(space: Path, settings: Sequence[str], study: str | None, storage: str | None) -> tuple[str, int] | None:
    """The study that a search of this space would go on with, and how many trials the space asks for."""
    from ranksearch.launch import read_space
    from ranksearch.storage import Store

    found, _ = read_space(space, settings)
    name = study or found.name or "search"
    return (name, found.budget.trials) if name in Store(storage).names() else None


@contextmanager
def _driving(storage: str | None, quiet: bool, as_json: bool) -> Iterator[Reporter]:
    """Show progress; turn Ctrl-C and what stops a running search into exit codes."""
    reporter = Reporter(quiet=quiet, as_json=as_json)
    try:
        with reporter:
            yield reporter
    except KeyboardInterrupt:
        from ranksearch.storage import Store

        name = reporter.study
        if name is None or name not in Store(storage).names():
            say("Interrupted before the first trial: no study was made.", style="yellow", stderr=True)
        else:
            study = Store(storage).open(name)
            complete = sum(trial.state == "COMPLETE" for trial in study.trials())
            if complete and not as_json:
                console().print(front_table(study))
            say(f"Interrupted: {complete} of {study.space.budget.trials} trials are done.", style="yellow", stderr=True)
            say(f"Go on with: ranksearch resume {name}{_place(storage)}", stderr=True)
        raise typer.Exit(130) from None
    except (RanksearchError, OSError) as error:
        if not reporter.trials:
            raise
        complain(error)
        say(f"Go on with: ranksearch resume {reporter.study}{_place(storage)}", stderr=True)
        raise typer.Exit(1) from None


def _conclude(study: Study, storage: str | None, as_json: bool) -> None:
    """The front, and what can be done with it; exit code 1 where it is empty."""
    trials = study.trials()
    if not trials:
        space = study.space
        limits = space.budget.model_dump(include={*LIMITS, "minutes"}, exclude_none=True)
        complain(
            f"a search needs a rank map to try, and {space.strategy.name} has none within the budget's limits "
            f"{limits}: no trial of {study.name} was made. Search again with wider limits, or another strategy."
        )
        raise typer.Exit(1)
    failed = [trial for trial in trials if trial.state == "FAIL"]
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    if not complete:
        reason = f" The first: {failed[0].reason}" if failed else ""
        complain(f"all {len(failed)} trials of {study.name} failed.{reason}")
        raise typer.Exit(1)
    if not study.front_trials(trials):
        if all(trial.proposal.fidelity < 1 for trial in complete):
            more = study.space.budget.trials + study.space.strategy.batch
            complain(
                f"a front needs a trial that was trained to the end, and none of {len(complete)} of {study.name} was: "
                "the rungs of strategy.rungs promote one after trials of the rung below have ended. Go on with "
                f"ranksearch resume {study.name} --trials {more}{_place(storage)}"
            )
            raise typer.Exit(1)
        limits = study.space.budget.model_dump(include={*LIMITS}, exclude_none=True)
        complain(f"none of {len(complete)} trials of {study.name} is within the budget's limits {limits}.")
        raise typer.Exit(1)
    if as_json:
        told = {"event": "end", "study": study.name, "done": len(complete), "failed": len(failed)}
        typer.echo(json.dumps({**told, "front": records(study.front(trials))}, allow_nan=False))
        return
    console().print(front_table(study))
    say(f"\nStudy {study.name}: {len(complete)} trials done, {len(failed)} failed.{_outlook(trials)} Go on with:")
    for command in _next_commands(study, storage):
        say(f"  {command}")


def _outlook(trials: list[Trial]) -> str:
    """What more trials would bring, where the strategy has said."""
    from ranksearch.strategies.auto import promise

    left = promise(trials)
    return "" if left is None else f" More are expected to enlarge the hypervolume by about {left:.1%}."


def _next_commands(study: Study, storage: str | None) -> list[str]:
    name, place = study.name, _place(storage)
    commands = [
        *([f"ranksearch dashboard {name}{place}"] if find_spec("dash") else []),
        f"ranksearch front {name} --html front.html{place}",
        f"ranksearch export {name} --knee -o rank_map.json --save-weights compressed.safetensors{place}",
        f"ranksearch evaluate rank_map.json{' --trust' if _calls_factories(study) else ''}{place}",
        f"ranksearch resume {name} --trials {2 * study.space.budget.trials}{place}",
    ]
    if study.space.tracking.enabled:
        commands.append(f"ranksearch ui {name}{place}")
    journal = study.folder / "journal.log"
    if find_spec("optuna_dashboard") and journal.exists():
        commands.append(f"optuna-dashboard {shlex.quote(str(journal))}")
    return commands


def _calls_factories(study: Study) -> bool:
    """Whether the rank map will name functions of the user's."""
    return ":" in study.space.model.name or ":" in study.space.data.source


def _place(storage: str | None) -> str:
    """How to name a storage that is not where commands look by themselves."""
    given = storage != os.environ.get("RANKSEARCH_STORAGE")
    return f" --storage {shlex.quote(redacted(storage))}" if storage and given else ""
