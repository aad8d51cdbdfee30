"""A job's log is followed through a lost connection, from a server of this machine that speaks as Ray's job server."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from aiohttp import web

from ranksearch.errors import JobError
from ranksearch.jobs import JobServer, client
from tests.services import free_port

LINES = [f"line {i}\n" for i in range(12)]


class Server(threading.Thread):
    """One job that prints a line every 0.2 seconds from when it is followed; away for 2 seconds soon after."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.port, self.followed = free_port(), asyncio.Event()
        self.started = float("inf")
        self.ready = threading.Event()

    def printed(self) -> list[str]:
        return LINES[: int((time.monotonic() - self.started) / 0.2)] if self.followed.is_set() else []

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        for seconds in (0.8, 60.0):
            app = web.Application()
            app.router.add_get("/api/version", self._version)
            app.router.add_get("/api/jobs/{id}", self._job)
            app.router.add_get("/api/jobs/{id}/logs", self._logs)
            app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self.ready.set()
            await self.followed.wait()
            await asyncio.sleep(seconds)
            await runner.cleanup()
            await asyncio.sleep(2.0)

    async def _version(self, request: web.Request) -> web.Response:
        found = {"version": "4", "ray_version": "2", "ray_commit": "", "session_name": ""}
        return web.json_response(found)

    async def _job(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != "one":
            return web.Response(status=404, text="no such job")
        state = "SUCCEEDED" if len(self.printed()) == len(LINES) else "RUNNING"
        return web.json_response({"type": "SUBMISSION", "submission_id": "one", "status": state, "entrypoint": ""})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(self.printed())})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.started = min(self.started, time.monotonic())
        self.followed.set()
        sent = 0
        while sent < len(LINES):
            for line in self.printed()[sent:]:
                await socket.send_str(line)
                sent += 1
            await asyncio.sleep(0.05)
        await socket.close()
        return socket


def test_following_survives_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_POLL_SECONDS", 0.2)
    server = Server()
    server.start()
    assert server.ready.wait(10)
    jobs = JobServer(f"http://127.0.0.1:{server.port}")
    assert "".join(jobs.follow("one")) == "".join(LINES)
    assert time.monotonic() - server.started > 2.8, "it was away"
    with pytest.raises(JobError, match="there must be a job 'other'"):
        list(jobs.follow("other"))
