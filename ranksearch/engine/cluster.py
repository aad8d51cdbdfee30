"""A connection to Ray for the time being: its settings, loggers and warnings, its machines."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import ray

from ranksearch import mirror
from ranksearch.engine import reason
from ranksearch.engine.processes import Started, end
from ranksearch.engine.resources import Node, local_cpus
from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "1000000000",
}
"""Tune without files, tables and warnings of its own (the study is the record), and Ctrl-C left to us."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
_KNOCKING_SECONDS = 30.0
_TRIES = 3
"""How often Ray is started here: on a busy machine it gives up on its own processes after half a minute."""
_ENDING_SECONDS = 10.0
"""How long the processes of a Ray that was started here may take to end by themselves."""


def nodes() -> list[Node]:
    """The machines of the cluster."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    found = [(node["Resources"], node.get("Labels", {})) for node in alive]
    return [Node(r.get("CPU", 0.0), r.get("GPU", 0.0), r.get("memory", 0.0), labels) for r, labels in found]


def carried() -> dict[str, str]:
    """Variables of this process that workers need: those of a cluster that was there before do not inherit them."""
    return {name: os.environ[name] for name in (mirror.VARIABLE,) if name in os.environ}


@contextlib.contextmanager
def cluster(spec: ResourcesSpec) -> Iterator[None]:
    """Ray, started or connected to for the time being.

    Leaving it is what stops running work for sure, so a connection that the process has already is not used.
    """
    if ray.is_initialized():
        raise EngineError(
            "this process is connected to Ray already. Call ray.shutdown() first; resources.address names a cluster."
        )
    local = spec.address == "local"
    started = Started()
    try:
        if local:
            _start(spec, started)
        else:
            _knock(spec.address)
            ray.init(address=spec.address, **_QUIET)
    except Exception as error:
        remedy = "Check the address and the cluster's token." if not local else "Check memory and disk."
        raise EngineError(f"cannot reach Ray at {spec.address!r}: {reason(error)}. {remedy}") from error
    try:
        yield
    finally:
        # Tune leaves actor handles in cycles; one collected after the shutdown, by any thread, ends the process.
        gc.collect()
        family = started.family() if local else []
        ray.shutdown()
        end(family, seconds=_ENDING_SECONDS)


def _knock(address: str) -> None:
    """Raise an ``OSError`` where nobody listens at ``HOST:PORT``: Ray would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCKING_SECONDS).close()


def _start(spec: ResourcesSpec, started: Started) -> None:
    """Start Ray on this machine, once more where it is too slow to start; what is left of a failed start is ended."""
    options: dict[str, Any] = {"num_cpus": local_cpus(spec)} if spec.workers else {}
    for left in reversed(range(_TRIES)):
        try:
            # Never without an address: Ray would join a cluster that happens to run on this machine.
            ray.init(address="local", include_dashboard=False, **options, **_QUIET)
            return
        except Exception as error:
            end(started.family())
            if not left or "timed out" not in str(error).lower():
                raise


@cache
def _token() -> str:
    """The secret of the clusters that this process starts; Ray would write one into the home directory."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def quiet(address: str) -> Iterator[None]:
    """Ray's and Tune's settings, loggers and warnings as the engine needs them, and afterwards as they were."""
    own = dict(_ENVIRONMENT)
    if address == "local" and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        own |= {"RAY_AUTH_TOKEN": _token()}
    # Ray sets RAY_AUTH_MODE itself when it starts a cluster, and reads it only then and when it is imported.
    before = {name: os.environ.get(name) for name in (*own, "RAY_AUTH_MODE")}
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.train", "ray._private")]
    levels = [logger.level for logger in loggers]
    os.environ.update(own)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")
            warnings.filterwarnings("ignore", category=ResourceWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
