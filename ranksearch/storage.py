"""Where studies live: a folder with one Optuna journal a study, or a database that Optuna knows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, TimeoutError

from ranksearch.errors import StudyError, reason_of
from ranksearch.journal import Journal, mend
from ranksearch.lock import FILE, DatabaseLock, lock_folder
from ranksearch.patience import Patience
from ranksearch.secrecy import redacted
from ranksearch.setting import Setting
from ranksearch.study import Study
from ranksearch.trial import MAXIMISED

_DOCUMENT = "ranksearch"
"""The attribute of a study that holds its setting."""
_CREATING = "creating"
"""The file in a study's folder that is there while the study is being made in a database."""


class Store:
    """Where studies live: a folder, and by default one Optuna journal a study in it.

    Args:
        uri: a folder, or the URL of a database that Optuna knows (``postgresql://...``, ``sqlite:///...``), whose
            files (weights, caches) then go to the default folder. Default: ``RANKSEARCH_STORAGE``, else
            ``~/.ranksearch``.
        patience_s: how long a driver waits for a storage that is away: a database down, a disk full.
    """

    def __init__(self, uri: str | Path | None = None, *, patience_s: float = 600.0) -> None:
        self._patience_s = patience_s
        uri = str(uri or os.environ.get("RANKSEARCH_STORAGE") or Path.home() / ".ranksearch")
        self.url = uri if "://" in uri else None
        self.folder = (Path.home() / ".ranksearch" if self.url else Path(uri)).expanduser().resolve()

    @property
    def cache(self) -> Path:
        """Folder of what can be computed again."""
        return self.folder / "cache"

    def folder_of(self, name: str) -> Path:
        """Folder of a study's files; studies of one name in several databases have one each.

        Raises:
            StudyError: the name is not fit for a folder.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise StudyError(
                f"the name of a study must be 1 to 100 letters, digits, '.', '_' or '-', found {name!r}. "
                "Choose another."
            )
        return self.folder / "studies" / (f"{name}@{_digest(self.url)}" if self.url else name)

    def names(self) -> list[str]:
        """Names of the studies that are here."""
        if self.url:
            storage = self._storage(self.folder)
            begun = {name.rpartition("@")[0] for name in self._folders_with(_CREATING)}
            known = optuna.get_all_study_names(storage)
            return sorted(one for one in known if one not in begun or self._half_made(storage, one) is None)
        return sorted(self._folders_with("journal.log"))

    def _folders_with(self, file: str) -> list[str]:
        """Names of the studies' folders in which a file is."""
        # The folder of the studies goes with the last name given back, even while it is read: then there are none.
        with suppress(FileNotFoundError):
            return [path.parent.name for path in self.folder.glob(f"studies/*/{file}")]
        return []

    @contextmanager
    def reserved(self, name: str, *, exact: bool) -> Iterator[str]:
        """Hold a name that no study has, for the study that the block creates; a block that fails gives it back.

        Args:
            name: the name, or unless ``exact`` the first of ``name``, ``name-2``, ``name-3``, ... that is free.
            exact: whether no other name will do.

        Raises:
            StudyError: the name is taken, or not fit for a folder, or the folder cannot be written.
        """
        known = set() if exact else set(self.names())
        numbered = (name if i == 1 else f"{name}-{i}" for i in count(1))
        for chosen in (one for one in numbered if one not in known):
            try:
                lock = self._reserve(chosen)
                break
            except _TakenError as error:
                if exact:
                    raise StudyError(str(error)) from error
        with lock:  # given back by the system where the process is killed
            try:
                yield chosen
            except BaseException:
                with suppress(StudyError):
                    if chosen not in self.names():
                        self._discard(chosen)
                        _give_back(self.folder_of(chosen))
                raise

    def _reserve(self, name: str) -> IO[str]:
        """The lock of the folder of a study to be."""
        folder: Path = self.folder_of(name)
        gone: OSError = FileNotFoundError("the folder comes and goes")
        for _ in range(100):
            if name in self.names():
                raise _TakenError(self._taken(name))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(folder)
            except BlockingIOError as error:
                raise _TakenError(
                    f"a new study must have a new name, {name!r} is being prepared by process {error}. "
                    "Give another name with --study."
                ) from error
            except (FileNotFoundError, FileExistsError) as error:
                # Another process may have just given the name back; mkdir, where the folder goes between its two looks,
                # says that it exists. A plain file in its place stays, and is told below.
                gone = error
                continue
            except OSError as error:
                _give_back(folder)
                raise self._unwritten(name, error) from error
            # Between the look and the lock the name may have been used, or given back together with the folder.
            if name not in self.names() and _is_still_at(lock, folder / FILE):
                return lock
            lock.close()
        raise self._unwritten(name, gone)

    def create(self, name: str, setting: Setting) -> Study:
        """A new study; raises :class:`StudyError` where there is one of this name, or it cannot be written.

        A study is there as a whole or not at all, whenever the process is killed.
        """
        folder, uid = self.folder_of(name), uuid.uuid4().hex
        if name in self.names():
            raise StudyError(self._taken(name))
        fresh = not folder.exists()
        part, journal = folder / "journal.part", folder / "journal.log"
        try:
            (folder / "weights").mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            storage = self._storage(part)
            if self.url:
                self._discard(name)
                (folder / _CREATING).touch()
            with self.explained():
                try:
                    study_id = _fill(storage, name, uid, setting)
                except DuplicatedStudyError:
                    (folder / _CREATING).unlink(missing_ok=True)  # the one that is there is not ours to remove
                    raise
            if self.url:
                (folder / _CREATING).unlink(missing_ok=True)
            else:
                part.rename(journal)
                storage = self._storage(journal)
        except OSError as error:
            part.unlink(missing_ok=True) if not fresh else shutil.rmtree(folder, ignore_errors=True)
            raise self._unwritten(name, error) from error
        return self._study(name, storage, study_id, setting, uid)

    def _half_made(self, storage: BaseStorage, name: str) -> int | None:
        """Number of a study in the database whose driver was killed on this machine while it made it; else None."""
        if not (self.folder_of(name) / _CREATING).exists():
            return None
        with suppress(KeyError):  # another process made the study, or none of this name is there
            study_id = storage.get_study_id_from_name(name)
            if _DOCUMENT not in storage.get_study_user_attrs(study_id):
                return study_id
        return None

    def _discard(self, name: str) -> None:
        """Remove what a killed driver left of a study in the database, that the name can be used; see `create`."""
        if self.url:
            storage = self._storage(self.folder)
            with self.explained():
                if (study_id := self._half_made(storage, name)) is not None:
                    storage.delete_study(study_id)
            (self.folder_of(name) / _CREATING).unlink(missing_ok=True)

    def open(self, name: str, *, read_only: bool = False) -> Study:
        """The study of this name; ``read_only``: not even a half-written last line is mended.

        Raises:
            StudyError: there is none, or it cannot be read.
        """
        folder = self.folder_of(name)
        if name not in self.names():
            known = ", ".join(self.names()) or "none"
            raise StudyError(
                f"there must be a study {name!r} in {self._place}, found: {known}. Check the name, or give --storage."
            )
        try:
            if not self.url and not read_only:
                mend(folder / "journal.log")
            storage = self._storage(folder / "journal.log")
            study_id = storage.get_study_id_from_name(name)
            attrs = storage.get_study_user_attrs(study_id)
            setting, uid = Setting.from_json(json.loads(attrs[_DOCUMENT])), str(attrs["uid"])
        except (LookupError, ValueError, TypeError, AttributeError, OSError, AssertionError) as error:
            raise StudyError(
                f"the study {name} in {self._place} cannot be read ({type(error).__name__}: {error}). "
                "It is damaged, or not one of ranksearch's: restore it from a copy, or search again."
            ) from error
        return self._study(name, storage, study_id, setting, uid)

    def _study(self, name: str, storage: BaseStorage, study_id: int, setting: Setting, uid: str) -> Study:
        patience = Patience(f"the storage {self._place}", seconds=self._patience_s, away=is_away)
        lock = None
        if self.url and self.url.startswith("postgresql"):
            lock = DatabaseLock(self.url, _POSTGRESQL, uid)
        return Study(name, self.folder_of(name), storage, study_id, setting, uid, patience=patience, lock=lock)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What Optuna's storages raise, as a :class:`StudyError`."""
        try:
            yield
        except DuplicatedStudyError as error:
            raise StudyError(
                f"a new study must have a new name, another process has just made one of this name in {self._place}. "
                "Give another name with --study."
            ) from error
        except StorageInternalError as error:
            cause = error.__cause__ or error
            raise StudyError(
                f"the storage {self._place} cannot be used: {reason_of(cause)}. Check that it is up and has "
                "space left; a search that it stopped can be resumed."
            ) from error

    @property
    def _place(self) -> str:
        return redacted(self.url) if self.url else str(self.folder)

    def _taken(self, name: str) -> str:
        return (
            f"a new study must have a new name, {name!r} exists in {self._place}. "
            f"Continue it with `ranksearch resume {name}`, or give another name with --study."
        )

    def _unwritten(self, name: str, error: OSError) -> StudyError:
        return StudyError(f"cannot write the study {name} in {self.folder_of(name)}: {error}. Check the space left.")

    def _storage(self, journal: Path) -> BaseStorage:
        """The database, or else the journal."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                if self.url:
                    # No ``pool_pre_ping``: a connection that was lost is to be heard of, since the lock went with it.
                    options = _POSTGRESQL if self.url.startswith("postgresql") else {}
                    storage = RDBStorage(self.url, engine_kwargs={"connect_args": options})
                    weakref.finalize(storage, storage.engine.dispose)  # else its connections are left to the collector
                    return storage
                return JournalStorage(Journal(journal))
            except Exception as error:  # whatever a database driver raises
                if self.url:
                    raise StudyError(
                        f"cannot reach the storage {self._place}: {reason_of(error)}. Check --storage."
                    ) from error
                if isinstance(error, OSError):
                    raise StudyError(
                        f"cannot open the study's storage {journal}: {error}. Check the folder."
                    ) from error
                raise


class _TakenError(Exception):
    """A name that another study has, or is about to have."""


def _digest(url: str) -> str:
    """Of the database that a URL names, whoever logs in there."""
    with suppress(ArgumentError):  # that it is none is told where the storage is opened
        found = make_url(url)._replace(username=None, password=None)
        if found.drivername.startswith("sqlite") and found.database:
            found = found._replace(database=str(Path(found.database).resolve()))
        url = found.render_as_string()
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def _fill(storage: BaseStorage, name: str, uid: str, setting: Setting) -> int:
    """Make the study in its storage; returns its number there."""
    objectives = setting.space.objectives
    directions = [StudyDirection.MAXIMIZE if o in MAXIMISED else StudyDirection.MINIMIZE for o in objectives]
    study_id = storage.create_new_study(directions, name)
    storage.set_study_system_attr(study_id, "study:metric_names", list(objectives))
    storage.set_study_user_attr(study_id, "uid", uid)
    storage.set_study_user_attr(study_id, _DOCUMENT, json.dumps(setting.to_json()))  # last: with it the study is whole
    return study_id


def _give_back(folder: Path) -> None:
    """Remove the folder of a study that was not made, but for what is not the study's."""
    with suppress(OSError):
        for name in ("journal.part", "journal.lock", _CREATING, FILE):
            (folder / name).unlink(missing_ok=True)
        if (folder / "weights").exists():
            (folder / "weights").rmdir()
        folder.rmdir()
        folder.parent.rmdir()


def _is_still_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one of this path, which may have been removed since."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


_POSTGRESQL = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    # The same of the server's side: so it gives back the lock of a driver whose machine vanished.
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}
"""How a connection to PostgreSQL notices within half a minute that the other side is gone."""


_SQLITE_AWAY = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")


def is_away(error: Exception) -> bool:
    """Whether a storage is away (no connection, a full disk, a file server that does not answer), and may come back."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, DBAPIError):
        if cause.connection_invalidated:
            return True
        # SQLite says with one kind of error that it is busy and that a table is not there.
        named = getattr(cause.orig, "sqlite_errorname", None)
        if named is not None:
            return str(named).startswith(_SQLITE_AWAY)
    if isinstance(cause, (FileNotFoundError, PermissionError)):
        return False
    return isinstance(cause, (OSError, OperationalError, InterfaceError, TimeoutError))
