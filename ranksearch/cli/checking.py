"""The command that checks the surroundings: doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import AsJson, Storage, say
from ranksearch.cli.progress import Reporter

_STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    space: Annotated[
        Path | None, typer.Argument(metavar="[SPACE.yaml]", help="A search space to check too.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A cluster: auto or HEAD:6379 checks each of its machines, from one of them; http://HEAD:8265 its "
            "job server, from anywhere.",
        ),
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Check Python, PyTorch, Ray, storage, MLflow, disk and a cluster, and say what to fix; exit code 1 if anything."""
    from ranksearch.doctor import examine

    with Reporter(quiet=as_json) as reporter:
        findings = []
        for finding in examine(space, storage=storage, address=address, notify=reporter.notify):
            findings.append(finding)
            if not as_json:
                say(f"{finding.state:8} {finding.check:9} {finding.found}", style=_STYLES[finding.state])
                if finding.remedy:
                    say(f"{'':18} {finding.remedy}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "failure" for finding in findings):
        raise typer.Exit(1)
