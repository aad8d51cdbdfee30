"""The command that opens the live dashboard."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from typing import Annotated

import typer

from ranksearch.cli.options import Storage, say
from ranksearch.cli.progress import Reporter
from ranksearch.errors import StudyError


def dashboard(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Studies to show; the latest ones by default.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8070,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; others than this machine's show it to all.")
    ] = "127.0.0.1",
    storage: Storage = None,
) -> None:
    """Show searches in the browser, live: progress, front, layer by layer, export; reads only. Ctrl-C ends it."""
    if find_spec("dash") is None:
        raise StudyError(
            "the dashboard needs Dash, which is not installed. Install it with `pip install 'ranksearch[dashboard]'`."
        )
    from dashboards.server import feeds_of, serving
    from ranksearch.storage import Store

    place = f" --storage {shlex.quote(storage)}" if storage else ""
    with ExitStack() as stack:
        with Reporter() as reporter:
            feeds = stack.enter_context(feeds_of(Store(storage), names or (), notify=reporter.notify))
        try:
            server = serving(feeds, host=host, port=port, place=place)
        except (OSError, SystemExit) as error:
            raise StudyError(
                f"port {port} of {host} must be free and ours to take: {error}. Give another with --port."
            ) from error
        say(f"Dashboard: http://{host}:{server.server_port}  studies: {', '.join(feeds)}  (Ctrl-C ends it)")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            server.serve_forever()
