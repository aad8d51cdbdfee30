"""A cache that many machines share, at any place that fsspec knows, behind each machine's own folder.

``RANKSEARCH_CACHE`` names it: a folder (local, NFS), ``s3://bucket/prefix``, ``gs://...``. An entry that this machine
lacks is fetched from there, one that it computes is put there, whole or not at all. The shared cache is a convenience:
where it cannot be reached, work goes on without it, and each kind of trouble is logged once.
"""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from ranksearch.secrecy import redacted

VARIABLE = "RANKSEARCH_CACHE"

_logger = logging.getLogger("ranksearch")


def fetch(entry: Path, folder: Path) -> bool:
    """Copy an entry of the cache ``folder`` from the shared cache, if it is there; whether it was."""
    if (place := _place()) is None:
        return False
    part = entry.with_name(f".{uuid.uuid4().hex}.part")
    try:
        system, root = _opened(place)
        entry.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(_remote(root, entry, folder), str(part))
        os.replace(part, entry)
        return True
    except FileNotFoundError:
        return False
    except Exception as error:  # whatever fsspec's many systems raise
        _failed(place, error)
        return False
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def offer(entry: Path, folder: Path, *, anew: bool = False) -> None:
    """Put an entry of the cache ``folder`` into the shared cache, unless it is there; ``anew`` also where it is."""
    if (place := _place()) is None:
        return
    try:
        system, root = _opened(place)
        target = _remote(root, entry, folder)
        if not anew and system.exists(target):
            return
        if _has_folders(system):
            # Readers see the new name only once the file is whole.
            part = f"{target}.{uuid.uuid4().hex}.part"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            try:
                system.put_file(str(entry), part)
                system.mv(part, target)
            finally:
                if system.exists(part):
                    system.rm_file(part)
        else:
            system.put_file(str(entry), target)  # object stores show an object once it is whole
    except Exception as error:  # as above; a full or absent cache costs a later computation, nothing more
        _failed(place, error)


def _place() -> str | None:
    return os.environ.get(VARIABLE) or None


@cache
def _opened(place: str) -> tuple[Any, str]:
    """The file system of a place, and the path there."""
    system, root = fsspec.core.url_to_fs(place)
    return system, str(root).rstrip("/")


def _remote(root: str, entry: Path, folder: Path) -> str:
    """The entry's path in the shared cache; its names are hashes and cannot lead out of it."""
    return f"{root}/{entry.relative_to(folder).as_posix()}"


def _has_folders(system: Any) -> bool:
    """Whether files are written piece by piece, and renamed at once."""
    protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
    return protocol in ("file", "local", "sftp", "ssh", "smb", "hdfs", "arrow_hdfs")


def _failed(place: str, error: Exception) -> None:
    told = redacted(str(error)).strip().splitlines()
    _complain(redacted(place), type(error).__name__, told[0][:200] if told else "")


@cache
def _complain(place: str, kind: str, told: str) -> None:
    """Warn, the first time that this process hears it."""
    _logger.warning("the shared cache %s cannot be used (%s: %s): work goes on without it", place, kind, told)
