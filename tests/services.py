"""Real services beside a test, each on a free port and ended by its process id: PostgreSQL, MLflow's server, Ray."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

_START_SECONDS = 120.0
_TRIES = 4
"""How often Ray is started: on a busy machine it gives up on its own processes after half a minute."""
PASSWORD = "hunter2"
"""Of PostgreSQL's user, who is let in with any; no log may have it."""


def own_port() -> int:
    """A port that nobody else is given while this process runs, for a server that comes and goes."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: it is shared with one that listens
    place.bind(("127.0.0.1", 0))
    port = int(place.getsockname()[1])
    place.detach()
    return port


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service(ABC):
    """A server that can be killed and started again on the same port and data."""

    def __init__(self, command: list[str], log: Path, **options: object) -> None:
        self._command = command
        self._log = log
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **self._options,  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, by)
            self._process.wait(60)
            self._process = None

    @abstractmethod
    def answers(self) -> bool:
        """Whether it can be worked with."""


class Postgres(Service):
    """PostgreSQL with an empty cluster of databases in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.port = own_port()
        owner = {"user": "postgres"} if os.getuid() == 0 else {}
        if owner:
            shutil.chown(folder, "postgres")
        data = folder / "data"
        initdb = [_program("initdb") or "initdb", "-D", str(data), "-U", "postgres", "-A", "trust"]
        subprocess.run(
            [*initdb, "--no-sync", "-E", "UTF8", "--locale=C"], check=True, capture_output=True, cwd=folder, **owner
        )  # type: ignore[call-overload]
        command = [_program("postgres") or "postgres", "-D", str(data), "-p", str(self.port), "-k", str(folder)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        super().__init__(command, folder / "log", cwd=folder, **owner)

    def url(self, database: str = "postgres") -> str:
        """Where a database is, which is made if need be."""
        import psycopg

        with psycopg.connect(self._url("postgres"), autocommit=True) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            if cursor.fetchone() is None:
                cursor.execute(f'CREATE DATABASE "{database}"')
        return self._url(database)

    def crash(self) -> None:
        """End it at once, connections and all, as a crash does."""
        self.stop(signal.SIGQUIT)

    def _url(self, database: str) -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class MlflowServer(Service):
    """An MLflow server over a database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.port = own_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
        command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(self.port), "--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        super().__init__(command, folder / "mlflow.log", cwd=folder, env=environment)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that runs; the test skips where its programs are not installed."""
    if _program("initdb") is None or _program("postgres") is None:
        pytest.skip("needs PostgreSQL's server (Debian: postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="ranksearch-postgres-"))
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    """One of PostgreSQL's programs, which Debian keeps off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    places = [os.environ.get("PATH", ""), *map(str, reversed(folders))]
    return shutil.which(name, path=os.pathsep.join(places))


NODE = ("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
"""A machine of Ray as a Python program, but for its options."""


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process beside the test, until the block is left."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=90)


@contextmanager
def ray_node(*command: str) -> Iterator[None]:
    """A machine of Ray that runs; one that gave up on its own processes is started again."""
    for left in reversed(range(_TRIES)):
        with started(*command) as process:
            assert process.stdout is not None
            if any("Ray runtime started" in line for line in process.stdout):
                yield
                return
            assert left, f"{command} ended with status {process.wait()}"


@contextmanager
def ray_cluster(cpus: int) -> Iterator[str]:
    """Address of a Ray cluster of one machine."""
    port = free_port()
    with ray_node(*NODE, "--head", f"--port={port}", f"--num-cpus={cpus}", "--include-dashboard=false"):
        yield f"127.0.0.1:{port}"


def patient(start: Callable[[], Any]) -> Any:
    """What ``start`` makes of Ray, begun anew where Ray gave up on its own processes; those are ended before."""
    from ranksearch.engine.processes import Started, end

    for left in reversed(range(_TRIES)):
        begun = Started()
        try:
            return start()
        except Exception as error:
            end(begun.family())
            if not left or "timed out" not in str(error).lower():
                raise
    raise AssertionError


def add_machine(cluster: Any) -> Any:
    """A machine of two CPUs that joins Ray's own ``Cluster``."""

    def start() -> Any:
        known = set(cluster.worker_nodes)
        try:
            return cluster.add_node(num_cpus=2)
        except TimeoutError:  # it is counted already
            cluster.worker_nodes = known
            raise

    return patient(start)
