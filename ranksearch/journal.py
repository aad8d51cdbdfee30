"""Optuna's journal file as a study is written to: safe on the disk where a trial ends, and whole after any kill."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.storages.journal._storage import JournalOperation


class Journal(JournalFileBackend):
    """Optuna's journal file, with a third of the waiting for the disk, and in order also after the disk was full.

    The disk is waited for where a trial ends, which makes what was written of it before safe as well. A killed driver
    loses nothing of what it wrote; a machine that loses power may lose trials that had not ended.
    """

    def __init__(self, path: Path) -> None:
        self._lock_file = _FileLock(path)
        super().__init__(str(path), lock_obj=self._lock_file)
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines; see Optuna's."""
        mend(self._path)  # a line that a full disk cut short would spoil the next one
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with get_lock_file(self._lock_file), self._path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            if any(log["op_code"] not in _UNHURRIED for log in logs):
                os.fsync(file.fileno())


_UNHURRIED = (
    JournalOperation.CREATE_TRIAL,
    JournalOperation.SET_TRIAL_USER_ATTR,
    JournalOperation.SET_TRIAL_SYSTEM_ATTR,
)


class _FileLock(BaseJournalFileLock):
    """A lock that the system takes back when its holder dies, so that a killed driver blocks nobody."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".lock")
        self._file: Any = None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._file.close()


def mend(journal: Path) -> None:
    """Cut off a last line that a full disk or a kill left half-written: what follows it would be unreadable."""
    if _ends_whole(journal):
        return
    lock = _FileLock(journal)
    lock.acquire()  # a driver that lives may be in the middle of the line
    try:
        if not _ends_whole(journal):
            with journal.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _ends_whole(journal: Path) -> bool:
    with journal.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
