"""Commands around searches as jobs on a Ray cluster: submit, jobs, status, logs, stop."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ranksearch.cli.options import AsJson, Settings, SpaceFile, complain, console, say
from ranksearch.cli.progress import Reporter

if TYPE_CHECKING:
    from ranksearch.jobs import Job, JobServer

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's job server, http://HEAD:8265, or auto on one of its machines. Default: this machine's.",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job, as `jobs` lists it.", show_default=False)]
_STOP_SECONDS = 75
"""The cluster gives a job 60 seconds."""


def submit(
    space: SpaceFile,
    settings: Settings = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the study; that of the space by default.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the study of that name; --set budget.trials=N extends it."),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Where studies live, seen from the cluster: a folder that all its machines share, or a database. "
            "Default: that of its head.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what the job prints until it ends.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent, as JSON; send nothing.")
    ] = False,
) -> None:
    """Run a search as a job on a Ray cluster, with the files and variables that the space names.

    With --follow the exit code is that of the job; Ctrl-C then leaves it running.
    """
    from ranksearch.jobs import wrap
    from ranksearch.launch import further_problems

    parcel = wrap(space, settings or (), study=study, storage=storage, resume=resume, check=further_problems)
    if dry_run:
        typer.echo(json.dumps(parcel.to_json(), indent=2))
        return
    with Reporter() as reporter:
        reporter.notify("sending the job", 0, 1)
        server = _server(address)
        server.submit(parcel)
    say(f"Job {parcel.id}: {len(parcel.files)} files sent, study {parcel.study}.")
    if not follow:
        for command in (f"logs -f {parcel.id}", f"status {parcel.id}", f"stop {parcel.id}"):
            say(f"  ranksearch {command}{_place(address)}")
        return
    _follow(server, parcel.id, address)
    _conclude(server.job(parcel.id))


def jobs(
    address: Address = None,
    everything: Annotated[bool, typer.Option("--all", help="Jobs of other programs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the searches that were submitted to a cluster, the latest first."""
    found = [job for job in _server(address).jobs() if everything or job.study is not None]
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in found], indent=2))
        return
    if not found:
        say("No search was submitted to this cluster.")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "study", "state", "started", "ended"):
        table.add_column(column)
    for job in found:
        table.add_row(job.id, job.study or "", job.state, _time(job.start_ms), _time(job.end_ms))
    console().print(table)


def status(job: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Show how a job stands."""
    found = _server(address).job(job)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    say(f"{found.id}: {found.state}, study {found.study or '(none)'}, started {_time(found.start_ms) or 'not yet'}")
    if found.ended:
        say(f"ended {_time(found.end_ms)}: {found.message.strip()}")


def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = None,
) -> None:
    """Show what a job printed; with -f also what it prints from now on, Ctrl-C leaves it running."""
    server = _server(address)
    if follow:
        server.job(job)  # a wrong name is told at once
        _follow(server, job, address)
    else:
        _print([server.logs(job)])


def stop(job: JobId, address: Address = None) -> None:
    """Stop a job as by Ctrl-C: its study is left in good order, and can be resumed."""
    server = _server(address)
    if server.job(job).ended:
        say(f"{job} has ended already: {server.job(job).state}.")
        return
    with Reporter() as reporter:
        reporter.notify("waiting for the job to end", 0, 1)
        found = server.stop(job, seconds=_STOP_SECONDS)
    again = f"ranksearch submit SPACE.yaml --study {found.study} --resume{_place(address)}"
    say(f"{job}: {found.state}. Go on with: {again}")
    if not found.ended:
        raise typer.Exit(1)


def _server(address: str | None) -> JobServer:
    from ranksearch.jobs import LOCAL, JobServer

    return JobServer(address or LOCAL)


def _follow(server: JobServer, job: str, address: str | None) -> None:
    try:
        _print(server.follow(job))
    except KeyboardInterrupt:
        say(f"\nThe job goes on. See it again with: ranksearch logs -f {job}{_place(address)}", stderr=True)
        raise typer.Exit(130) from None


def _print(parts: Iterable[str]) -> None:
    """Write what a job printed, as it is."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()


def _conclude(job: Job) -> None:
    if job.state != "SUCCEEDED":
        complain(f"{job.id}: {job.state}. {job.message.strip().splitlines()[0] if job.message.strip() else ''}".strip())
        raise typer.Exit(1)
    say(f"{job.id}: {job.state}.")


def _place(address: str | None) -> str:
    return f" --address {address}" if address else ""


def _time(milliseconds: int | None) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000):%Y-%m-%d %H:%M:%S}" if milliseconds else ""
