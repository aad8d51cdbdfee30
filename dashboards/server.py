"""Serving the dashboard: on this machine alone unless another address is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from threading import Thread

from flask import Flask, Response, abort, request
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from dashboards.app import build
from dashboards.feed import Feed
from dashboards.figures import front_of
from ranksearch.errors import StudyError
from ranksearch.storage import Store

_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
MOST = 7
"""Studies that one page shows at most: more lines cannot be told apart."""


@contextmanager
def feeds_of(
    store: Store, names: Sequence[str], *, notify: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Iterator[Mapping[str, Feed]]:
    """What reads these studies, in the background, until the block ends; without names the latest of the store.

    Raises:
        StudyError: there is no such study, or more are asked for than one page can show.
    """
    if len(names) > MOST:
        raise StudyError(f"the dashboard shows at most {MOST} studies, found {len(names)}. Name fewer.")
    wanted = list(dict.fromkeys(names)) or _latest(store)
    if not wanted:
        raise StudyError(f"there must be a study in {store.folder}, found none. Search first, or give --storage.")
    feeds: dict[str, Feed] = {}
    for i, name in enumerate(wanted):
        notify(f"reading {name}", i, len(wanted))
        feeds[name] = Feed(store.open(name, read_only=True))
    try:
        for feed in feeds.values():
            feed.start()
        yield feeds
    finally:
        for feed in feeds.values():
            feed.close()


def _latest(store: Store) -> list[str]:
    """Names of the studies that were written last, the latest first."""

    def written(name: str) -> float:
        journal = store.folder_of(name) / "journal.log"
        return journal.stat().st_mtime if journal.exists() else 0.0

    return sorted(store.names(), key=written, reverse=True)[:MOST]


class _Quiet(WSGIRequestHandler):
    """Without a line for every request; connections are kept, as a page asks every second."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def serving(feeds: Mapping[str, Feed], *, host: str, port: int, place: str = "") -> BaseWSGIServer:
    """A server that listens already; ``serve_forever`` answers, ``server_port`` is its port (0 asks for a free one).

    Raises:
        OSError: the address cannot be had.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app: Flask = build(feeds, place=place).server

    @app.before_request
    def known_host() -> None:
        # A page elsewhere could have its own name lead here; on this machine's address only this machine's names do.
        if _loopback(host) and not _loopback(request.host.rpartition(":")[0] or request.host):
            abort(403, "This dashboard answers to localhost only. Start it with --host to open it to others.")

    @app.after_request
    def headers(response: Response) -> Response:
        response.headers.update(_HEADERS)
        return response

    # Else the first page would wait for pandas and Plotly, and the first pick and export for torch.
    for feed in feeds.values():
        front_of(feed.snapshot, (), {})
    Thread(target=_warm, name="warming up", daemon=True).start()
    return make_server(host, port, app, threaded=True, request_handler=_Quiet)


def _warm() -> None:
    import ranksearch.export  # noqa: F401


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
