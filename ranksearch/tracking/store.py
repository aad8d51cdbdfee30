"""Where MLflow's records live: the store's URI, a connection that fails early and clearly, and its pages."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranksearch.errors import TrackingError, reason_of
from ranksearch.secrecy import filled
from ranksearch.space import TrackingSpec

# Read when MLflow is imported and whenever it ends a run: else it prints links, and calls home.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import sqlalchemy
from mlflow import MlflowClient, MlflowException

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")


def ui_command(spec: TrackingSpec, *, folder: Path, port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command that serves MLflow's pages for this store on this machine, and what to add to its environment.

    Both are empty where the store is a server itself: open its URI.
    """
    uri = store_uri(spec, folder)
    if uri.startswith(_SERVERS):
        return [], {}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", (folder / "mlartifacts").resolve().as_uri()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Without job execution it is two processes instead of fifteen.
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def store_uri(spec: TrackingSpec, folder: Path) -> str:
    """The store's URI; raises :class:`TrackingError` where MLflow would fall back to files in the working directory."""
    if spec.uri is None:
        return f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    uri = str(filled(spec.uri))
    scheme, colon, rest = uri.partition("://")
    if uri.startswith("databricks") or (colon and rest.strip("/") and scheme.split("+")[0] in (*_DATABASES, *_SERVERS)):
        return uri
    raise TrackingError(
        "tracking.uri must be a server (http://host:port) or a database (sqlite:////path/mlflow.db, postgresql://...), "
        f"found {shown(spec.uri)!r}. Correct it, or leave it out for a SQLite file beside the studies."
    )


def connect(uri: str, experiment: str, folder: Path) -> tuple[MlflowClient, str]:
    """A client, and the id of the experiment, which is created if need be."""
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It says that it starts and stops; what it cannot write is missed by nobody.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.CRITICAL)
    location = None
    if uri.startswith(_SERVERS):
        # MLflow's own patience is several minutes a request; the writer comes back later anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    else:
        # Without a location MLflow puts a database's artifacts into the working directory.
        location = (folder / "mlartifacts").resolve().as_uri()
        if uri.startswith("sqlite"):
            folder.mkdir(parents=True, exist_ok=True)
        engine = sqlalchemy.create_engine(uri)
        try:
            engine.connect().close()  # MLflow itself would try for 100 seconds
        finally:
            engine.dispose()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            return client, client.create_experiment(experiment, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(experiment)  # another search may have been quicker
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {experiment!r} at {shown(uri)} is deleted. Restore it (`mlflow experiments "
            "restore`) or name another as tracking.experiment."
        )
    return client, found.experiment_id


def answers(uri: str) -> None:
    """Raise :class:`TrackingError` where the store does not answer; a SQLite file need not exist yet."""
    with explained(uri):
        if uri.startswith(_SERVERS):
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        elif not uri.startswith("sqlite"):
            engine = sqlalchemy.create_engine(uri)
            try:
                engine.connect().close()
            finally:
                engine.dispose()


def use_write_ahead_log(database: Path) -> Callable[[], None]:
    """Make commits to one SQLite file cheap, on every connection to it; returns what undoes that.

    With a write-ahead log a commit need not wait for the disk: after a power cut the last ones may be missing, and
    ``sync`` writes them again.
    """

    def tune(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            (_, _, file), *_ = connection.execute("PRAGMA database_list").fetchall()
            if file and Path(file) == database.resolve():
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")

    sqlalchemy.event.listen(sqlalchemy.Pool, "connect", tune)
    return lambda: sqlalchemy.event.remove(sqlalchemy.Pool, "connect", tune)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Whatever a store, its driver or the network raises, as a :class:`TrackingError` without passwords."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        reason = reason_of(error).replace(uri, shown(uri))
        raise TrackingError(
            f"the MLflow store {shown(uri)} cannot be used: {reason}. Check tracking.uri and that the store is up, "
            "leave tracking.uri out for a SQLite file beside the studies, or set tracking.enabled=false."
        ) from error


def shown(uri: str) -> str:
    """The URI without its password."""
    try:
        return sqlalchemy.make_url(uri).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return uri


def is_rejection(error: Exception) -> bool:
    """Whether the store answered that the record itself is wrong, or its run was deleted: trying again is no use."""
    return isinstance(error, MlflowException) and error.error_code in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
    )
