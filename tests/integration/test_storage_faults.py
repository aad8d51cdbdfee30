"""What a search survives of its storage: a database and an MLflow server that go away, a full disk, another driver.

Every driver is a process of its own, PostgreSQL and the MLflow server are real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ranksearch.driver import STOPPED
from ranksearch.engine import Evaluate
from ranksearch.errors import StudyError, TakenOver
from ranksearch.launch import drive
from ranksearch.lock import FILE
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Outcome, Proposal, Task
from tests.driving import NAME, Plan, check_mlflow, check_study
from tests.services import PASSWORD, MlflowServer, Postgres, postgres
from tests.studies import TABLE, setting_of
from tests.tables import table_outcome

pytestmark = [
    pytest.mark.xdist_group("postgres"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
AWAY_SECONDS = 30.0


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def mlflow(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), database.url("mlflow"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def local(folder: Path) -> str:
    """An MLflow store that no server is needed for."""
    return f"sqlite:///{folder}/mlflow.db"


def plan(
    folder: Path, storage: str | Path, *, trials: int, uri: str | None = None, experiment: str = "", **more: object
) -> Plan:
    tracking = {"enabled": False} if uri is None else {"uri": uri, "experiment": experiment or folder.name}
    sections = {
        "budget": {"trials": trials},
        "strategy": {"name": "random"},
        "tracking": tracking,
        "deterministic": False,
    }
    return Plan(folder=str(folder), storage=str(storage), sections=sections, **more)  # type: ignore[arg-type]


def test_a_database_that_crashes_for_half_a_minute(database: Postgres, mlflow: MlflowServer, tmp_path: Path) -> None:
    """The study and MLflow's records are both in it."""
    search = plan(tmp_path, database.url("crash"), trials=40, uri=mlflow.uri, seconds=0.2)
    driver = search.start()
    try:
        search.wait(12, driver)
        database.crash()
        begun = search.evaluated()
        time.sleep(AWAY_SECONDS)
        assert driver.poll() is None, search.log
        assert search.evaluated() <= begun + 1, "what cannot be recorded is not begun"
        database.start()
        assert driver.wait(200) == 0, search.log
    finally:
        driver.kill()
        driver.wait()
        if not database.answers():
            database.start()
    trials = check_study(search.study(), 40)
    assert {trial.state for trial in trials} == {"COMPLETE"}
    assert len(search.study().trials()) == 40, "no trial was cut short"
    assert "does not answer" in search.log
    assert "answers again" in search.log
    assert PASSWORD not in search.log
    search.finish()  # where MLflow came back too late
    check_mlflow(mlflow.uri, search.study())


def test_an_mlflow_server_that_is_killed_for_half_a_minute(
    database: Postgres, mlflow: MlflowServer, tmp_path: Path
) -> None:
    search = plan(tmp_path, tmp_path, trials=100, uri=mlflow.uri, seconds=0.4)
    driver = search.start()
    try:
        search.wait(8, driver)
        mlflow.stop(signal.SIGKILL)
        back = time.monotonic() + AWAY_SECONDS
        search.wait(30, driver)  # the search does not wait for MLflow
        time.sleep(max(0.0, back - time.monotonic()))
        mlflow.start()
        assert driver.wait(200) == 0, search.log
    finally:
        driver.kill()
        driver.wait()
        if not mlflow.answers():
            mlflow.start()
    search.finish()  # where MLflow came back too late
    check_study(search.study(), 100)
    check_mlflow(mlflow.uri, search.study())


def test_a_result_that_cannot_be_recorded_in_time_is_spooled_and_replayed(database: Postgres, tmp_path: Path) -> None:
    search = plan(tmp_path, database.url("spool"), trials=8, uri=local(tmp_path), patience_s=2.0, held=True)
    driver = search.start()
    try:
        search.wait(1, driver)
        database.crash()
        search.release()
        assert driver.wait(200) != 0
    finally:
        driver.kill()
        driver.wait()
        database.start()
    assert "StudyError" in search.log
    assert "can be resumed" in search.log
    (spool,) = tmp_path.glob(f"**/studies/{NAME}@*/spool.jsonl")
    before = search.evaluated()
    search.finish()
    trials = check_study(search.study(), 8)
    assert {trial.state for trial in trials} == {"COMPLETE"}
    assert len(search.study().trials()) == 8, "the spooled trial was not tried again"
    assert search.evaluated() == 8 == before + 7
    assert not spool.exists()
    check_mlflow(local(tmp_path), search.study())


def test_a_driver_killed_while_its_database_is_away_loses_no_result(database: Postgres, tmp_path: Path) -> None:
    search = plan(tmp_path, database.url("killed"), trials=6, uri=local(tmp_path), held=True)
    driver = search.start()
    try:
        search.wait(1, driver)
        database.crash()
        search.release()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"**/studies/{NAME}@*/spool.jsonl")):
            assert driver.poll() is None, search.log
            assert time.monotonic() < deadline, search.log
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
        database.start()
    search.finish()
    assert {trial.state for trial in check_study(search.study(), 6)} == {"COMPLETE"}
    assert search.evaluated() == 6
    check_mlflow(local(tmp_path), search.study())


@pytest.mark.parametrize("where", ["journal", "database"])
def test_of_two_drivers_the_second_is_refused_and_a_stale_lock_is_taken_over(
    where: str, database: Postgres, tmp_path: Path
) -> None:
    storage = tmp_path if where == "journal" else database.url("drivers")
    uri = local(tmp_path)
    search = plan(tmp_path, storage, trials=1000, uri=uri, experiment="two", seconds=0.5)
    # Another machine: it has neither the home nor the files of the first.
    other = tmp_path if where == "journal" else tmp_path / "elsewhere"
    # No more trials than there are already.
    second = plan(other, storage, trials=1, uri=uri, experiment="two", seconds=0.5)
    driver = search.start()
    try:
        search.wait(2, driver)
        refused = second.start()
        assert refused.wait(200) != 0
        holder = (
            rf"driven by process {driver.pid} on {re.escape(os.uname().nodename)} since 20\d\d-\d\d-\d\d [\d:]+ UTC"
        )
        assert re.search(holder, second.log), second.log
        assert driver.poll() is None, "the first goes on"
    finally:
        driver.kill()
        driver.wait()
    second.finish()
    study = second.study()
    check_study(study, study.space.budget.trials)
    check_mlflow(uri, study)


def test_a_driver_whose_study_was_taken_over_while_the_database_was_away_stops(
    database: Postgres, mlflow: MlflowServer, tmp_path: Path
) -> None:
    """The first is stopped in its tracks, as if its machine had been cut off, until a second one has the study.

    MLflow is a server, as machines share it: a process that is stopped while it writes to a SQLite file keeps the file
    locked for all others.
    """
    storage, uri = database.url("fenced"), mlflow.uri
    first = plan(tmp_path / "first", storage, trials=12, uri=uri, experiment="fenced", seconds=0.3)
    second = plan(tmp_path / "second", storage, trials=12, uri=uri, experiment="fenced", seconds=0.3)
    driver = first.start()
    try:
        first.wait(3, driver)
        driver.send_signal(signal.SIGSTOP)
        database.crash()
        database.start()
        other = second.start()
        try:
            second.wait(2, other)
            driver.send_signal(signal.SIGCONT)
            assert driver.wait(200) != 0
            assert other.wait(200) == 0, second.log
        finally:
            other.kill()
            other.wait()
    finally:
        driver.kill()
        driver.wait()
    assert "taken over by" in first.log
    check_study(second.study(), 12)
    assert STOPPED not in {trial.reason for trial in second.study().trials()}, "the first ended nothing of the second"
    check_mlflow(uri, second.study())


def cut_off(database: Postgres, study: Study) -> None:
    """What a network that is cut for a while does to a driver: server and file server give its locks to others."""
    import psycopg

    with psycopg.connect(database.url(), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    (study.folder / FILE).unlink(missing_ok=True)


def test_an_ousted_driver_touches_nothing_of_its_successor(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its trial, nor its weights, nor its run of MLflow; both have one folder, as on a file server."""
    from mlflow import MlflowClient

    from ranksearch.tracking import connected

    monkeypatch.setenv("HOME", str(tmp_path))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    space = plan(tmp_path, database.url("ousted"), trials=4, uri=uri).space
    first = Store(database.url("ousted")).create(NAME, setting_of(space))
    successor = Store(database.url("ousted")).open(NAME)
    weights = successor.weights_folder / "0.safetensors"
    proposal = Proposal(choices=TABLE.dense, origin="test")
    with ExitStack() as stack:

        def evaluator() -> Evaluate:
            return evaluate

        def evaluate(task: Task) -> Outcome:
            cut_off(database, first)
            stack.enter_context(successor.driving())
            successor.recover()
            successor.begin(proposal, index=1)
            weights.touch()
            return table_outcome(TABLE, task.choices)

        tracker = stack.enter_context(connected(space, tmp_path))
        with pytest.raises(TakenOver, match=f"taken over by process {os.getpid()} on"), first.driving():
            drive(first, evaluator, [], tracker, lambda *_: None, None)
        with pytest.raises(TakenOver):
            first.recover()
        assert [trial.state for trial in successor.trials()] == ["FAIL", "RUNNING"]
        assert weights.exists()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(space.tracking.experiment)
    assert experiment is not None
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"RUNNING"}


def test_a_driver_that_lost_its_lock_goes_on_unless_another_one_had_it_meanwhile(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    space = plan(tmp_path, database.url("lost"), trials=4).space
    study = Store(database.url("lost")).create(NAME, setting_of(space))
    proposal = Proposal(choices=TABLE.dense, origin="test")
    with study.driving():
        trial = study.begin(proposal, index=0)
        cut_off(database, study)
        study.finish(trial, table_outcome(TABLE, TABLE.dense))
        trial = study.begin(proposal, index=1)
        cut_off(database, study)
        with Store(database.url("lost")).open(NAME).driving():
            pass
        for _ in range(2):
            with pytest.raises(TakenOver, match="one that has ended since"):
                study.finish(trial, table_outcome(TABLE, TABLE.dense))
            with pytest.raises(TakenOver):
                study.begin(proposal, index=2)
    assert [trial.state for trial in study.trials()] == ["COMPLETE", "RUNNING"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 1024)
    return ballast


def test_a_disk_that_is_full_for_a_while(small_disk: Path, tmp_path: Path) -> None:
    search = plan(tmp_path, small_disk, trials=30, uri=local(tmp_path), seconds=0.2)
    driver = search.start()
    try:
        search.wait(6, driver)
        ballast = fill(small_disk)
        deadline = time.monotonic() + 60
        while "No space left" not in search.log:
            assert driver.poll() is None, search.log
            assert time.monotonic() < deadline, search.log
            time.sleep(0.1)
        begun = search.evaluated()
        time.sleep(2)
        assert search.evaluated() <= begun + 1, "what cannot be recorded is not begun"
        ballast.unlink()
        assert driver.wait(200) == 0, search.log
    finally:
        driver.kill()
        driver.wait()
    check_study(search.study(), 30)
    assert len(search.study().trials()) == 30
    check_mlflow(local(tmp_path), search.study())


def test_a_search_that_a_full_disk_ended_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    search = plan(tmp_path, small_disk, trials=20, uri=local(tmp_path), seconds=0.2, patience_s=1.0)
    driver = search.start()
    try:
        search.wait(6, driver)
        ballast = fill(small_disk)
        assert driver.wait(200) != 0
    finally:
        driver.kill()
        driver.wait()
    ballast.unlink()
    search.finish()
    check_study(search.study(), 20)
    check_mlflow(local(tmp_path), search.study())


def test_a_name_is_one_studys_on_all_machines(database: Postgres, tmp_path: Path) -> None:
    url = database.url("names")
    search = plan(tmp_path, url, trials=4)
    search.store.create(NAME, setting_of(search.space))
    with pytest.raises(StudyError, match="must have a new name"):
        search.store.create(NAME, setting_of(search.space))
    assert search.store.names() == [NAME]
