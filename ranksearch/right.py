"""The right to write a study: one driver at a time, on one machine or on several."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.exc import SQLAlchemyError

from ranksearch.errors import StudyError, TakenOver
from ranksearch.lock import DatabaseLock, lock_folder
from ranksearch.patience import Patience

_DRIVER = "driver"
"""Attribute of a study that tells the drivers apart which had it one after the other."""


class Right:
    """Held by the driver of a study: by a lock of its folder and, in a database, by one of that too."""

    def __init__(self, name: str, folder: Path, storage: BaseStorage, study_id: int, lock: DatabaseLock | None) -> None:
        self._name = name
        self._folder = folder
        self._storage = storage
        self._study_id = study_id
        self._lock = lock
        self._driver = ""
        """What this driver wrote when it took the lock."""
        self._doubtful = False
        """Whether the lock was lost for a while, and nobody has looked yet if another driver had it then."""

    @contextmanager
    def held(self, patience: Patience) -> Iterator[None]:
        """Take the right, and give it back; raises :class:`StudyError` where another driver holds it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(self._folder))
                if self._lock is not None:
                    stack.enter_context(self._lock.held())
            except BlockingIOError as error:
                raise StudyError(
                    f"a study must have one driver at a time, {self._name} is driven by process {error}. "
                    "Wait for it, or stop it."
                ) from error
            if self._lock is not None:
                self._driver = uuid.uuid4().hex
                patience(lambda _: self._storage.set_study_user_attr(self._study_id, _DRIVER, self._driver))
            yield

    def check(self) -> None:
        """Whoever lost the right, even unnoticed, writes nothing more.

        Raises:
            TakenOver: another driver has the study, or had it since.
        """
        if self._lock is None:
            return
        try:
            self._doubtful = self._lock.renew() or self._doubtful
        except SQLAlchemyError as error:
            raise StorageInternalError(str(error)) from error  # told as the storage's own troubles are
        if self._doubtful and self._storage.get_study_user_attrs(self._study_id).get(_DRIVER) != self._driver:
            raise TakenOver(
                f"a study must have one driver at a time: while the database was away, {self._name} was taken over by "
                "one that has ended since. Resume."
            )
        self._doubtful = False
