"""Who may write a study: one driver at a time, told by its process, its host and since when.

The right is one that the system takes back when its holder dies, so a killed driver blocks nobody and no clock decides
who is dead: a lock of the file system on a file beside the study, and for a study in PostgreSQL an advisory lock of a
session too, since its drivers may be on different machines. (A connection pool that deals out its sessions by the
transaction, as PgBouncer may, cannot hold such a lock.)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ranksearch.errors import TakenOver

FILE = "driver.lock"
_LONGEST_NAME = 63
"""What PostgreSQL keeps of a session's name, in bytes."""


def lock_folder(folder: Path) -> IO[str]:
    """Take the right to write a study, held until the file that is returned is closed or the process ends.

    Raises:
        BlockingIOError: another process has it; the message names that.
    """
    file = (folder / FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{_me()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise BlockingIOError(holder) from error
    except OSError:
        file.close()
        raise
    return file


class DatabaseLock:
    """The same right as an advisory lock of a session of a PostgreSQL database.

    The session ends with its process; of a machine that vanished the server hears within half a minute.

    Args:
        url: of the database.
        connect_args: of its driver.
        uid: of the study.
    """

    def __init__(self, url: str, connect_args: dict[str, Any], uid: str) -> None:
        import sqlalchemy

        named = connect_args | {"application_name": _me()[:_LONGEST_NAME]}
        self._engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=named)
        self._connection: sqlalchemy.Connection | None = None
        digest = hashlib.sha256(f"ranksearch {uid}".encode()).digest()
        self._keys = {"high": int.from_bytes(digest[:4]) >> 1, "low": int.from_bytes(digest[4:8]) >> 1}
        """Two positive numbers of 31 bits."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; raises :class:`BlockingIOError` with its holder where another session has it."""
        try:
            self._take()
            yield
        finally:
            self._drop()

    def renew(self) -> bool:
        """Take the lock again where the session was lost; whether it was, so that others may have had it meanwhile.

        Raises:
            TakenOver: another driver has it.
        """
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
                return False
            except SQLAlchemyError:
                self._drop()
        try:
            self._take()
            return True
        except BlockingIOError as error:
            raise TakenOver(
                "a study must have one driver at a time: while the database was away, it was taken over by "
                f"process {error}. Leave it to that one, or stop that one and resume."
            ) from error

    def _take(self) -> None:
        from sqlalchemy import text

        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            got = connection.execute(text("SELECT pg_try_advisory_lock(:high, :low)"), self._keys).scalar()
            holder = "" if got else connection.execute(text(_HOLDER), self._keys).scalar()
        except BaseException:
            connection.close()
            raise
        if not got:
            connection.close()
            raise BlockingIOError(holder or "unknown")
        self._connection = connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


_HOLDER = """
SELECT application_name || ' since ' || to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') || ' UTC'
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND classid = :high AND objid = :low AND objsubid = 2 AND granted
"""


def _me() -> str:
    return f"{os.getpid()} on {os.uname().nodename}"
