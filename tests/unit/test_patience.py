"""A storage that is away is waited for; what it could not take is on disk meanwhile."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from ranksearch.patience import Patience
from ranksearch.spool import Spool
from ranksearch.storage import Store, is_away
from ranksearch.trial import Failure, Proposal, Trial
from tests.studies import TABLE, setting_of, space_of
from tests.tables import table_outcome

OUTCOME = table_outcome(TABLE, TABLE.dense)
KILLED = Failure(reason="killed", interrupted=True)


def trial(number: int) -> Trial:
    return Trial(number=number, index=number, proposal=Proposal(choices=TABLE.dense, origin="test"), state="RUNNING")


def test_what_fails_is_tried_again_and_told_so(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def act(again: bool) -> int:
        seen.append(f"act {again}")
        if len(seen) < 4:
            raise OSError(28, "No space left on device")
        return 7

    assert Patience("the disk", seconds=30, away=is_away)(act, lost=lambda: seen.append("lost")) == 7
    assert seen == ["act False", "lost", "act True", "act True"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "the disk does not answer ([Errno 28] No space left on device); trying again" in told[0]
    assert "the disk answers again" in told[1]


def test_patience_ends_and_then_everything_is_tried_once_until_something_succeeds() -> None:
    patience, tries, up = Patience("the disk", seconds=1.0, away=is_away), 0, False

    def act(_: bool) -> str:
        nonlocal tries
        tries += 1
        if not up:
            raise OSError(5, "Input/output error")
        return "done"

    began = time.monotonic()
    with pytest.raises(OSError, match="Input/output"):
        patience(act)
    assert 1.0 <= time.monotonic() - began < 10
    assert tries > 2
    tries = 0
    with pytest.raises(OSError, match="Input/output"):
        patience(act)
    assert tries == 1
    up = True
    assert patience(act) == "done"
    up, tries = False, 0
    with pytest.raises(OSError, match="Input/output"):
        patience(act)
    assert tries > 1


def test_a_mistake_is_not_waited_for() -> None:
    def act(_: bool) -> None:
        raise KeyError("number")

    with pytest.raises(KeyError):
        Patience("the disk", seconds=60, away=is_away)(act)


def database_error(statement: str, path: Path) -> StorageInternalError:
    """What a storage makes of an error of SQLite's."""
    try:
        with sqlite3.connect(path, timeout=0) as connection:
            connection.execute(statement)
    except sqlite3.OperationalError as error:
        told = StorageInternalError("the storage failed")
        told.__cause__ = OperationalError(statement, {}, error)
        return told
    raise AssertionError("it went well")


def test_which_errors_say_that_a_storage_is_away(tmp_path: Path) -> None:
    path = tmp_path / "one.db"
    assert not is_away(database_error("SELECT * FROM nothing", path))
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert is_away(database_error("CREATE TABLE one (a)", path))
    holder.close()
    assert is_away(OSError(28, "No space left on device"))
    assert is_away(TimeoutError())
    assert not is_away(FileNotFoundError())
    assert not is_away(ValueError())


def test_what_a_locked_database_could_not_take_is_recorded_later(tmp_path: Path) -> None:
    """In vain: SQLite itself waits for five seconds, which is more than the patience here."""
    study = Store(f"sqlite:///{tmp_path}/one.db", patience_s=0.1).create("one", setting_of(space_of()))
    begun = study.begin(Proposal(choices=TABLE.dense, origin="test"), index=0)
    holder = sqlite3.connect(tmp_path / "one.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with study.driving(), pytest.raises(StorageInternalError):
        study.finish(begun, OUTCOME)
    holder.close()
    assert (study.folder / "spool.jsonl").exists()
    (ended,) = study.recover()
    assert ended.outcome == OUTCOME, "the result was in the spool"
    assert ended.state == "COMPLETE"
    assert not list(study.folder.glob("spool*"))


def test_only_a_driver_waits_for_its_storage(tmp_path: Path) -> None:
    study = Store(tmp_path, patience_s=1.0).create("one", setting_of(space_of()))
    journal = study.folder / "journal.log"
    journal.unlink()
    journal.mkdir()  # which is read with an error of the system
    began = time.monotonic()
    with pytest.raises(IsADirectoryError):
        study.trials()
    assert time.monotonic() - began < 1
    began = time.monotonic()
    with study.driving(), pytest.raises(IsADirectoryError):
        study.trials()
    assert time.monotonic() - began >= 1


def test_the_spool_gives_back_what_was_put_in(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl", "mine")
    assert spool.read() == {}
    assert spool.put(trial(3), OUTCOME)
    assert spool.put(trial(5), KILLED)
    assert Spool(tmp_path / "spool.jsonl", "mine").read() == {3: OUTCOME, 5: KILLED}
    assert Spool(tmp_path / "spool.jsonl", "another study's").read() == {}
    with (tmp_path / "spool.jsonl").open("ab") as file:
        file.write(b'{"study": "mine", "number": 7, "outco')  # a kill in the middle of a line
    assert spool.put(trial(8), KILLED)
    assert spool.read() == {3: OUTCOME, 5: KILLED, 8: KILLED}
    spool.drop(trial(3))
    assert spool.read() == {5: KILLED, 8: KILLED}
    spool.drop(trial(5))
    spool.drop(trial(8))
    assert not list(tmp_path.iterdir())


def test_a_spool_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert not Spool(tmp_path / "missing" / "spool.jsonl", "mine").put(trial(0), OUTCOME)
