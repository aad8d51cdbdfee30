"""Jobs on a Ray cluster over its HTTP server: sent, listed, followed, stopped; with the cluster's token."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranksearch.errors import JobError
from ranksearch.jobs.parcel import Parcel
from ranksearch.secrecy import redacted

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOCAL = "http://127.0.0.1:8265"
"""The job server of a head on this machine."""

_TALKATIVE = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
"""Ray's modules that tell on stderr what they upload."""
_POLL_SECONDS = 1.0
_RECONNECTIONS = 5
"""How often in a row the log may be lost before it is given up; the pauses double, to a minute in all."""
_AGENT_SECONDS = 120.0
"""How long a head that has just started may take until a machine of it accepts jobs."""
_FINAL = (401, 403, 404)
"""HTTP states that stay as they are: the token is wrong, or there is no such job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, as the cluster knows it."""

    id: str
    state: str
    """``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``: Ray's names."""
    study: str | None
    """None of jobs that are not ranksearch's."""
    message: str
    start_ms: int | None
    """Milliseconds since 1970."""
    end_ms: int | None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


class JobServer:
    """The job server of one cluster.

    Args:
        address: ``http://HEAD:8265``, or ``auto`` for the cluster that this machine belongs to.

    Raises:
        JobError: it does not answer, or does not accept the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _explained(address), _settled_environment():
            from ray.job_submission import JobSubmissionClient

            for name in _TALKATIVE:
                logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
            self._client = JobSubmissionClient(address, headers=_headers())

    def submit(self, parcel: Parcel) -> None:
        """Send a job, and return as soon as the cluster has it."""
        with tempfile.TemporaryDirectory(prefix="ranksearch-job-") as folder, _explained(self.address):
            environment = parcel.pack(Path(folder))
            until = time.monotonic() + _AGENT_SECONDS
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=parcel.entrypoint,
                        submission_id=parcel.id,
                        runtime_env=environment,
                        metadata=parcel.metadata,
                    )
                except RuntimeError as error:
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise
                    time.sleep(_POLL_SECONDS)
                else:
                    return

    def jobs(self) -> list[Job]:
        """The jobs that were submitted to the cluster, the latest first."""
        with _explained(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: -(job.start_ms or 0))

    def job(self, id: str) -> Job:
        """One job; raises :class:`JobError` where there is none of this id."""
        with _explained(self.address, id):
            return _job(self._client.get_job_info(id))

    def logs(self, id: str) -> str:
        """All that the job has printed."""
        with _explained(self.address, id):
            return str(self._client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """What the job prints, as it does, until it has ended; a lost connection is made again."""
        shown, failures = 0, 0
        while True:
            skip = shown
            lost: Exception | None = None
            try:
                for text in self._tail(id):
                    # A new connection begins with the whole log again.
                    fresh, skip = text[skip:], max(0, skip - len(text))
                    if fresh:
                        shown, failures = shown + len(fresh), 0
                        yield fresh
            except Exception as error:  # whatever the network, aiohttp or the server raise
                lost = error
            try:
                if self.job(id).ended:
                    if rest := self.logs(id)[shown:]:
                        yield rest
                    return
            except JobError as error:
                if isinstance(error.__cause__, Exception) and _status(error.__cause__) in _FINAL:
                    raise
                lost = error
            failures = failures + 1 if lost else 0
            if lost and failures > _RECONNECTIONS:
                raise JobError(
                    f"the log of {id} at {self.address} was lost: {_reason(lost)}. The job may go on: see "
                    f"`ranksearch status {id}`."
                ) from lost
            time.sleep(_POLL_SECONDS * 2**failures)

    def _tail(self, id: str) -> Iterator[str]:
        """The log from its beginning, as it grows."""
        lines = self._client.tail_job_logs(id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            with suppress(Exception):
                loop.run_until_complete(lines.aclose())  # type: ignore[attr-defined]
            loop.close()

    def stop(self, id: str, *, seconds: float) -> Job:
        """Ask a job to end as by Ctrl-C, and wait for it so long at most; returns it as it is then."""
        with _explained(self.address, id):
            self._client.stop_job(id)
        deadline = time.monotonic() + seconds
        while not (job := self.job(id)).ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return job


def token() -> str | None:
    """The cluster's token as Ray finds it: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip() or None
    return None


def _headers() -> dict[str, str]:
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        state=str(details.status.value),
        study=(details.metadata or {}).get("ranksearch.study"),
        message=redacted(details.message or ""),
        start_ms=details.start_time,
        end_ms=details.end_time,
    )


@contextmanager
def _settled_environment() -> Iterator[None]:
    """The address is the one given: Ray lets its variables override it, and asks one of them for the token's use."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE")
    before = {name: os.environ.get(name) for name in names}
    for name in names[:2]:
        os.environ.pop(name, None)
    if token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _explained(address: str, id: str | None = None) -> Iterator[None]:
    """Whatever Ray and the network raise, as a :class:`JobError` with its remedy."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if _status(error) in (401, 403):
            found = "none" if token() is None else "one that it does not accept"
            raise JobError(
                f"the cluster at {address} must be given its token, found {found}. Print it on the head with "
                "`ray get-auth-token`, and put it into ~/.ray/auth_token or RAY_AUTH_TOKEN here."
            ) from error
        if id is not None and _status(error) == 404:
            raise JobError(
                f"there must be a job {id!r} at {address}. `ranksearch jobs` lists those there are."
            ) from error
        raise JobError(
            f"the job server at {address} cannot be used: {_reason(error)}. Check --address (http://HEAD:8265, or auto "
            "on the cluster's machines) and that the head runs with its dashboard; see `ranksearch doctor --address`."
        ) from error


def _status(error: Exception) -> int | None:
    """The HTTP status that an error tells of: Ray has it in its text, or in a type of its own, aiohttp in a field."""
    if type(error).__name__ == "AuthenticationError":
        return 401
    told = re.search(r"status code (\d{3})", str(error))
    found = getattr(error, "status", None)
    return int(told[1]) if told else found if isinstance(found, int) else None


def _reason(error: Exception) -> str:
    lines = redacted(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
