"""What the commands share: options, the two consoles, and how errors are shown."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ranksearch.secrecy import redacted

SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="The search space.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the space, e.g. budget.trials=40; repeatable."),
]
StudyName = Annotated[str, typer.Argument(metavar="NAME", help="The study.", show_default=False)]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        envvar="RANKSEARCH_STORAGE",
        help="Where studies live: a folder, or a database's URL. Default: ~/.ranksearch.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AsJsonLines = Annotated[
    bool, typer.Option("--json", help="Print one line of JSON for each trial, and one with the front at the end.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import and call the functions (package.module:function) that the map names.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def console(*, stderr: bool = False) -> Console:
    """Results go to stdout, progress and errors to stderr; a pipe gets lines wide enough for any table."""
    found = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    return found if found.is_terminal else Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=160)


def say(text: str = "", *, style: str | None = None, stderr: bool = False) -> None:
    """Print one text, never wrapped, so that commands in it can be copied."""
    console(stderr=stderr).print(text, style=style, soft_wrap=True)


def complain(problem: object) -> None:
    """Print an error in red on stderr, with a remedy where the system gives none."""
    if isinstance(problem, OSError):
        if problem.errno == errno.ENOSPC or "No space left" in str(problem):
            problem = f"the disk is full: {problem}. Free some space, or choose another folder with --storage."
        else:
            problem = f"a file or folder cannot be used: {problem}. Check that it exists and may be written."
    say(f"Error: {redacted(str(problem))}", style="red", stderr=True)
