"""The MLflow view against real stores, read back through MLflow's own client."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from ranksearch.driver import Driver
from ranksearch.errors import TrackingError
from ranksearch.space import TrackingSpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.tracking import Tracker, TrialRecord, View, ui_command
from ranksearch.trial import Failure, Proposal
from tests.studies import TABLE, setting_of, space_of
from tests.tables import proposal_outcome, table_outcome

LAYERS = [f"layer{i}.conv{j}" for i in range(3) for j in range(6)]
DENSE = {"accuracy": 0.9, "accuracy_search": 0.91, "macs": 40_000_000, "params": 270_000}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it a second to create."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    """A folder of studies whose store is there already."""
    path = tmp_path / "studies"
    path.mkdir()
    shutil.copyfile(empty_database, path / "mlflow.db")
    return path


def record(number: int, *, failed: bool = False, on_front: bool = False) -> TrialRecord:
    measured = {
        "accuracy_search": 0.5 + number / 100,
        "loss": float("nan"),
        "macs": 20_000_000.0 + number,
        "seconds": 2.0,
    }
    tags = {"state": "FAIL", "reason": "out of memory"} if failed else {"state": "COMPLETE", "origin": "energy"}
    return TrialRecord(
        number=number,
        name=f"trial {number}",
        params={layer: "tucker2(8, 8)" if i % 2 else "dense" for i, layer in enumerate(LAYERS)},
        metrics={} if failed else measured,
        tags={**tags, "on_front": str(on_front).lower()},
        rank_map=None if failed else {"schema_name": "ranksearch/rank-map", "macs": 20_000_000 + number},
        status="FAILED" if failed else "FINISHED",
        start_ms=1_700_000_000_000 + number,
        end_ms=1_700_000_002_000 + number,
    )


def tables(count: int, on_front: set[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    trials = pd.DataFrame(
        {
            "number": range(count),
            "state": "COMPLETE",
            "origin": "energy",
            "accuracy": [0.5 + n / 100 for n in range(count)],
            "accuracy_search": [0.5 + n / 100 for n in range(count)],
            "macs": [20_000_000 + n for n in range(count)],
            "macs_ratio": [0.5 + n / 40_000_000 for n in range(count)],
            "gmacs": [0.02 + n / 1e9 for n in range(count)],
            "params": 1000,
            "on_front": [n in on_front for n in range(count)],
        }
    )
    front = trials[trials["on_front"]].rename(columns={"number": "trial"})
    return trials, front.assign(accuracy_low=front["accuracy"] - 0.01, accuracy_high=front["accuracy"] + 0.01)


@contextmanager
def tracking(folder: Path, *, uri: str | None = None, study: str = "digits", trials: int = 40) -> Iterator[Tracker]:
    tracker = Tracker(TrackingSpec(uri=uri), folder=folder, pauses_s=(0.01,))
    try:
        tracker.start(
            study=study,
            params={"budget.trials": trials, "seed": 0},
            tags={"device": "cpu"},
            documents={"space.json": {"seed": 0}, "versions.json": {"torch": "2"}, "space.yaml": "seed: 0\n"},
        )
        yield tracker
    finally:
        tracker.close()


def finish(tracker: Tracker, count: int, on_front: set[int], status: str = "FINISHED") -> None:
    trials, front = tables(count, on_front)
    tracker.finish(
        status=status,  # type: ignore[arg-type]
        metrics={"best_accuracy": 0.8, "undefined": float("inf")},
        front=front,
        trials=trials,
        dense=DENSE,
        files={"rank_map.json": "{}", "notes/raw.bin": b"\x00\x01"},
    )


def runs(uri: str, study: str = "digits") -> tuple[list[Run], list[Run]]:
    """The searches' runs of a study and the trials' runs, by trial."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ranksearch")
    assert experiment is not None
    found = [r for r in client.search_runs([experiment.experiment_id]) if r.data.tags["ranksearch.study"] == study]
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {run.info.run_id for run in parents}
    return parents, sorted(children, key=lambda run: int(run.data.tags["ranksearch.trial"]))


def artifact(uri: str, run: Run, name: str, folder: Path) -> bytes:
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        return Path(MlflowClient(tracking_uri=uri).download_artifacts(run.info.run_id, name, str(folder))).read_bytes()


def front_table(uri: str, run: Run) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)  # load_table does not heed its own client's URI
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        return MlflowClient().load_table(run.info.experiment_id, "front.json", [run.info.run_id])


def check_a_search(uri: str, folder: Path, tmp_path: Path) -> None:
    """A search of five trials, everything it shows, and a resume that adds a trial and changes the front."""
    with tracking(folder, uri=uri if uri.startswith("http") else None) as tracker:
        for number in range(5):
            tracker.trial(record(number, failed=number == 3, on_front=number < 2))
            tracker.hypervolume(number + 1, 0.1 * number, record(number).end_ms)
        finish(tracker, 5, {1, 4}, "KILLED")
    (parent,), children = runs(uri)
    assert parent.info.status == "KILLED"
    assert parent.data.params == {"budget.trials": "40", "seed": "0"}
    assert parent.data.tags["device"] == "cpu"
    assert parent.data.metrics == {"best_accuracy": 0.8, "hypervolume": pytest.approx(0.4)}
    assert [child.info.status for child in children] == ["FINISHED"] * 3 + ["FAILED", "FINISHED"]
    assert children[4].data.params == dict(record(4).params)
    assert children[4].data.metrics == {"accuracy_search": 0.54, "macs": 20_000_004.0, "seconds": 2.0}
    assert (children[4].info.start_time, children[4].info.end_time) == (1_700_000_000_004, 1_700_000_002_004)
    assert children[3].data.tags["reason"] == "out of memory"
    assert [child.data.tags["on_front"] for child in children] == ["false", "true", "false", "false", "true"]
    assert json.loads(artifact(uri, children[4], "rank_map.json", tmp_path / "c")) == record(4).rank_map
    assert json.loads(artifact(uri, parent, "space.json", tmp_path / "p")) == {"seed": 0}
    assert artifact(uri, parent, "notes/raw.bin", tmp_path / "p") == b"\x00\x01"
    assert artifact(uri, parent, "front.png", tmp_path / "p").startswith(b"\x89PNG")
    assert b"Plotly.newPlot" in artifact(uri, parent, "front.html", tmp_path / "p")

    with tracking(folder, uri=uri if uri.startswith("http") else None, trials=80) as tracker:
        assert runs(uri)[0][0].info.status == "RUNNING"
        tracker.sync([record(number, failed=number == 3) for number in range(5)])
        tracker.trial(record(5))
        for step in range(1, 7):
            tracker.hypervolume(step, 0.1 * (step - 1), record(step).end_ms)
        finish(tracker, 6, {4, 5})
    (parent,), resumed = runs(uri)
    client = MlflowClient(tracking_uri=uri)
    assert [child.info.run_id for child in resumed[:5]] == [child.info.run_id for child in children]
    assert [len(client.get_metric_history(child.info.run_id, "macs")) for child in resumed] == [1, 1, 1, 0, 1, 1]
    assert [point.step for point in client.get_metric_history(parent.info.run_id, "hypervolume")] == list(range(1, 7))
    assert [child.data.tags["on_front"] for child in resumed] == ["false"] * 4 + ["true", "true"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["budget.trials"] == "40"
    assert parent.data.tags["resumed.budget.trials"] == "80"
    table = front_table(uri, parent)
    assert table["trial"].tolist() == [4, 5], "the first front's table is replaced, not added to"
    assert table["accuracy"].tolist() == pytest.approx([0.54, 0.55])


def test_a_search_and_its_resume_on_the_default_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = tmp_path / "my studies"
    check_a_search(f"sqlite:///{folder / 'mlflow.db'}", folder, tmp_path)
    assert os.listdir(tmp_path / "cwd") == []
    assert {name for name in os.listdir(folder) if "-" not in name} == {"mlflow.db", "mlartifacts"}
    assert capfd.readouterr() == ("", "")


def test_the_default_store_has_a_write_ahead_log_and_others_are_left_alone(tmp_path: Path) -> None:
    for folder, uri, expected in (("a", None, "wal"), ("b", f"sqlite:///{tmp_path / 'b.db'}", "delete")):
        with tracking(tmp_path / folder, uri=uri) as tracker:
            with closing(sqlite3.connect(tracker.uri.removeprefix("sqlite:///"))) as database:
                assert database.execute("PRAGMA journal_mode").fetchone() == (expected,)
            location = MlflowClient(tracking_uri=tracker.uri).get_experiment_by_name("ranksearch").artifact_location  # type: ignore[union-attr]
        assert location == (tmp_path / folder / "mlartifacts").as_uri()


def test_a_driver_killed_in_the_middle_of_a_trial_is_mended(folder: Path) -> None:
    with tracking(folder) as tracker:
        tracker.trial(record(0))
    uri = tracker.uri
    (parent,), (done,) = runs(uri)
    client = MlflowClient(tracking_uri=uri)
    tags = {"mlflow.parentRunId": parent.info.run_id, "ranksearch.study": "digits", "ranksearch.kind": "trial"}
    for number in (1, 2):  # what is left of a driver that died after its first call for trials 1 and 2
        client.create_run(parent.info.experiment_id, tags={**tags, "ranksearch.trial": str(number)})
    with tracking(folder) as tracker:
        tracker.sync([record(0), record(1), record(3, failed=True)])  # the study never saw the end of trial 2
    _, children = runs(uri)
    assert [child.info.status for child in children] == ["FINISHED", "FINISHED", "KILLED", "FAILED"]
    assert children[0].info.end_time == done.info.end_time
    assert children[1].data.params == dict(record(1).params)
    assert children[1].data.tags["origin"] == "energy"
    assert json.loads(artifact(uri, children[1], "rank_map.json", folder / "out")) == record(1).rank_map


def test_two_drivers_write_a_point_of_the_hypervolume_once(folder: Path) -> None:
    """The second began when the first had not written any yet, and the first does not know that it was ousted."""
    store, space = Store(folder), space_of(budget={"trials": 6}, strategy={"name": "random"})
    study = store.create("digits", setting_of(space))
    ranks = build_strategy(space.strategy, Terms(seed=0, objectives=("accuracy", "macs")))
    with (
        closing(Tracker(TrackingSpec(), folder=folder)) as ousted,
        closing(Tracker(TrackingSpec(), folder=folder)) as tracker,
    ):
        view, again = View(study, ousted), View(store.open("digits"), tracker)
        driver = Driver(study, ranks, view=view)
        while isinstance(tasks := driver.take(4), list):
            for task in tasks:
                driver.done(task, table_outcome(TABLE, task.choices))
        Driver(store.open("digits"), ranks, view=again)
    (parent,), _ = runs(tracker.uri)
    points = MlflowClient(tracking_uri=tracker.uri).get_metric_history(parent.info.run_id, "hypervolume")
    assert sorted(point.step for point in points) == list(range(6))
    ends = [trial.end_ms for trial in study.trials()]
    assert {point.step: point.timestamp for point in points} == {n: max(ends[: n + 1]) for n in range(6)}


def test_more_parameters_and_longer_texts_than_mlflow_takes_at_once(folder: Path) -> None:
    params = {f"features.layer{i}": "svd(4)" * (2000 if i == 0 else 1) for i in range(250)}
    long = TrialRecord(number=0, name="t", params=params, tags={"reason": "x" * 10_000}, start_ms=1, end_ms=2)
    with tracking(folder) as tracker:
        tracker.trial(long)
    _, (child,) = runs(tracker.uri)
    assert child.info.status == "FINISHED"
    assert len(child.data.params) == 250
    assert child.data.params["features.layer0"] == ("svd(4)" * 2000)[:6000]
    assert set(child.data.tags["reason"]) == {"x"}


@contextmanager
def full_disk(uri: str, table: str) -> Iterator[None]:
    """The store fails whenever a row is added to ``table``."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute(
            f"CREATE TRIGGER full BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
        yield
        database.execute("DROP TRIGGER full")


@pytest.mark.parametrize("table", ["runs", "params", "metrics"])
def test_a_store_that_fails_for_a_while_costs_neither_the_search_nor_a_trial(
    folder: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking(folder) as tracker, caplog.at_level(logging.WARNING, logger="ranksearch"):
        tracker.trial(record(0))
        tracker.flush()
        with full_disk(tracker.uri, table):
            for number in range(1, 20):
                tracker.trial(record(number))
                tracker.hypervolume(number, 0.5, record(number).end_ms)
            tracker.flush()
        finish(tracker, 20, {0, 19})
    (warning,) = caplog.messages
    assert "disk is full" in warning
    (parent,), children = runs(tracker.uri)
    assert parent.info.status == "FINISHED"
    assert [int(child.data.tags["ranksearch.trial"]) for child in children] == list(range(20))
    assert all(child.info.status == "FINISHED" and len(child.data.params) == 18 for child in children)


def test_a_run_whose_creation_was_not_heard_of_is_found_again(folder: Path) -> None:
    with tracking(folder) as tracker:
        with full_disk(tracker.uri, "runs"):
            tracker.trial(record(7))
            tracker.flush()
        # The store did create the run, and only its answer was lost.
        (parent,), _ = runs(tracker.uri)
        tags = {"mlflow.parentRunId": parent.info.run_id, "ranksearch.study": "digits", "ranksearch.trial": "7"}
        lost = MlflowClient(tracking_uri=tracker.uri).create_run(parent.info.experiment_id, tags=tags)
        tracker.flush()
    _, (child,) = runs(tracker.uri)
    assert (child.info.run_id, child.info.status) == (lost.info.run_id, "FINISHED")
    assert child.data.params == dict(record(7).params)
    assert child.data.tags["state"] == "COMPLETE"


def test_what_an_ousted_driver_wrote_before_it_knew_is_not_there_twice(folder: Path) -> None:
    with tracking(folder) as ousted, tracking(folder) as successor:
        ousted.trial(record(0))
        ousted.trial(record(1))
        ousted.flush()
        ousted.drop()
        ousted.trial(record(3))
        for number in (0, 1, 2):
            successor.trial(record(number))
        successor.flush()
        assert len(runs(successor.uri)[1]) == 5
        finish(successor, 3, {1})
    (parent,), children = runs(successor.uri)
    assert [child.data.tags["ranksearch.trial"] for child in children] == ["0", "1", "2"]
    assert [child.data.tags["on_front"] for child in children] == ["false", "true", "false"]
    assert parent.info.status == "FINISHED"


def test_a_store_that_stays_broken_is_filled_by_the_next_resume(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="ranksearch")
    with tracking(folder) as tracker, full_disk(tracker.uri, "params"):
        for number in range(3):
            tracker.trial(record(number))
        finish(tracker, 3, {0})
    assert "resume the study" in caplog.messages[-1]
    with tracking(folder) as tracker:
        tracker.sync([record(number) for number in range(3)])
        finish(tracker, 3, {0})
    (parent,), children = runs(tracker.uri)
    assert [child.info.status for child in (parent, *children)] == ["FINISHED"] * 4
    assert [len(child.data.params) for child in children] == [18] * 3


def test_a_trial_whose_run_was_deleted_does_not_stop_the_others(folder: Path) -> None:
    with tracking(folder) as tracker:
        tracker.trial(record(0))
        tracker.trial(record(1))
        tracker.flush()
        _, children = runs(tracker.uri)
        MlflowClient(tracking_uri=tracker.uri).delete_run(children[0].info.run_id)
        finish(tracker, 2, {0, 1})
    (parent,), (child,) = runs(tracker.uri)
    assert parent.info.status == "FINISHED"
    assert child.data.tags["on_front"] == "true"


def test_studies_of_the_same_name_are_told_apart_by_their_id(folder: Path) -> None:
    tracker = Tracker(TrackingSpec(), folder=folder)
    for study_id in ("first", "second", "first"):
        tracker.start(study="it's mine", params={}, tags={}, documents={}, study_id=study_id)
    tracker.close()
    parents, _ = runs(tracker.uri, "it's mine")
    assert sorted(parent.data.tags["ranksearch.study_id"] for parent in parents) == ["first", "second"]


@pytest.mark.parametrize(
    "uri",
    ["", "mlruns", "./mlruns", "file:///tmp/mlruns", "localhost:5000", "ftp://host/x", "http://", "sqlite:///"],
)
def test_a_malformed_uri_is_an_error_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=r"tracking\.uri must be a server"):
        Tracker(TrackingSpec(uri=uri), folder=tmp_path / "studies")
    assert os.listdir(tmp_path) == []


def test_a_store_that_does_not_answer_is_an_error_without_its_password(tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        uri = f"http://user:hunter2@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TrackingError, match=r"tracking\.enabled=false") as caught:
            Tracker(TrackingSpec(uri=uri), folder=tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_database_that_is_none_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    started = time.monotonic()
    with pytest.raises(TrackingError, match="not a database"):
        Tracker(TrackingSpec(), folder=tmp_path)
    assert time.monotonic() - started < 10


def test_a_deleted_experiment_is_an_error(folder: Path) -> None:
    with tracking(folder) as tracker:
        client = MlflowClient(tracking_uri=tracker.uri)
    client.delete_experiment(client.get_experiment_by_name("ranksearch").experiment_id)  # type: ignore[union-attr]
    with pytest.raises(TrackingError, match="is deleted"):
        Tracker(TrackingSpec(), folder=folder)


def test_nothing_is_served_where_the_store_is_a_server(tmp_path: Path) -> None:
    assert ui_command(TrackingSpec(uri="http://127.0.0.1:5000"), folder=tmp_path) == ([], {})


@contextmanager
def served(command: list[str], environment: dict[str, str], folder: Path, port: int) -> Iterator[str]:
    """A real MLflow server, run in an empty working directory, ended by its process id."""
    folder.mkdir()
    log = folder.parent / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_search_and_its_resume_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1"]
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with served(command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, tmp_path / "server", port) as uri:
        check_a_search(uri, tmp_path / "studies", tmp_path)
    assert os.listdir(tmp_path / "cwd") == []
    assert not (tmp_path / "studies").exists(), "a server keeps everything itself"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_server_that_goes_away_does_not_stop_the_search(tmp_path: Path) -> None:
    port = free_port()
    spec = TrackingSpec(uri=f"sqlite:///{tmp_path / 'server.db'}")
    command, environment = ui_command(spec, folder=tmp_path / "studies", port=port)
    with served(command, environment, tmp_path / "server", port) as uri:
        tracker = Tracker(TrackingSpec(uri=uri), folder=tmp_path, pauses_s=(0.1,))
        tracker.start(study="digits", params={}, tags={}, documents={})
        tracker.trial(record(0))
        tracker.flush()
    handed_over = Event()

    def wait(again: bool) -> None:
        handed_over.wait()

    tracker._writer.submit(wait)  # whoever waited for what is written would wait for ever
    for number in range(1, 10):
        tracker.trial(record(number))
    handed_over.set()
    tracker.close()
    with served(command, environment, tmp_path / "server again", port):
        with tracking(tmp_path, uri=uri) as tracker:
            tracker.sync([record(number) for number in range(10)])
        _, children = runs(uri)
    assert [child.info.status for child in children] == ["FINISHED"] * 10


@pytest.mark.slow
def test_the_pages_command_serves_the_default_store(tmp_path: Path) -> None:
    with tracking(tmp_path / "studies") as tracker:
        tracker.trial(record(0))
    port = free_port()
    command, environment = ui_command(TrackingSpec(), folder=tmp_path / "studies", port=port)
    with served(command, environment, tmp_path / "cwd", port) as uri:
        (_,), (child,) = runs(uri)
        page = urllib.request.urlopen(f"{uri}/get-artifact?path=rank_map.json&run_uuid={child.info.run_id}", timeout=20)
        with page:
            assert json.load(page) == record(0).rank_map
    assert os.listdir(tmp_path / "cwd") == []


def test_of_funnel_runs_settings_ranks_and_the_course_are_shown(folder: Path) -> None:
    study = Store(folder).create("digits", setting_of(space_of(strategy={"name": "funnel"})))
    strategy = build_strategy(study.space.strategy, Terms(seed=0, objectives=("accuracy", "macs")))
    proposal = strategy.propose(TABLE, [])
    assert isinstance(proposal, Proposal)
    gates = {"strength": 0.1, "macs_ratio": 1.2, "alive": {"a": [8, 8], "b": [3]}}
    fewer = {"strength": 0.2, "macs_ratio": 0.6, "alive": {"a": [4, 5], "b": [1]}}
    history = [
        {"step": 4, "phase": "settle", "loss": 2.0, "c": None, **gates},
        {"step": 8, "phase": "penalty", "loss": 1.0, "c": 0.5, **fewer},
        {"step": 12, "phase": "fine-tune", "loss": 0.5},
    ]
    outcome = replace(proposal_outcome(TABLE, proposal), details={"history": history})
    done = study.finish(study.begin(proposal, index=0), outcome)
    failed = study.finish(study.begin(proposal, index=1), Failure(reason="out of memory"))
    with closing(Tracker(TrackingSpec(), folder=folder)) as tracker:
        View(study, tracker).sync([done, failed])
    _, (shown, lost) = runs(tracker.uri)
    client = MlflowClient(tracking_uri=tracker.uri)
    course = {
        name: [(point.step, point.value) for point in client.get_metric_history(shown.info.run_id, f"funnel.{name}")]
        for name in ("loss", "strength", "macs_ratio", "gates", "c")
    }
    assert course == {
        "loss": [(4, 2.0), (8, 1.0), (12, 0.5)],
        "strength": [(4, 0.1), (8, 0.2)],
        "macs_ratio": [(4, 1.2), (8, 0.6)],
        "gates": [(4, 19.0), (8, 10.0)],
        "c": [(8, 0.5)],
    }
    assert shown.data.params["funnel.target"] == "0.5"
    assert outcome.layers is not None
    for name, ended in outcome.layers.items():
        assert shown.data.params[name] == f"{ended['format']}({ended['ranks'][0]},)"
    assert lost.data.params.keys() == {f"funnel.{name}" for name in proposal.settings}
    assert lost.info.status == "FAILED"


def test_no_password_is_shown(folder: Path) -> None:
    space = space_of(tracking={"uri": "https://me:Pa55word@example.org/mlflow"})
    study = Store(folder).create("one", setting_of(space))
    assert study.space.tracking.uri == "https://me:Pa55word@example.org/mlflow", "a resume must get in"
    with closing(Tracker(TrackingSpec(), folder=folder)) as tracker:
        View(study, tracker).finish("FINISHED")
    (document,) = folder.rglob("space.json")
    assert json.loads(document.read_text())["tracking"]["uri"] == "https://me:***@example.org/mlflow"
    for path in [*folder.glob("mlflow.db*"), *folder.glob("mlartifacts/**/*")]:
        assert path.is_dir() or b"Pa55word" not in path.read_bytes(), path


def test_a_picture_that_cannot_be_drawn_does_not_keep_the_run_from_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise ValueError("no font")

    study = Store().create("plain", setting_of(space_of()))
    proposal = Proposal(choices=TABLE.dense, origin="test")
    study.finish(study.begin(proposal, index=0), proposal_outcome(TABLE, proposal))
    with closing(Tracker(TrackingSpec(), folder=folder)) as tracker, caplog.at_level(logging.WARNING, "ranksearch"):
        view = View(study, tracker)
        monkeypatch.setattr("ranksearch.tracking.view.png", broken)
        view.finish("KILLED")
        client = MlflowClient(tracking_uri=tracker.uri)
    assert "pictures of plain cannot be drawn" in caplog.text
    assert "no font" in caplog.text
    (parent,) = client.search_runs([run.experiment_id for run in client.search_experiments()])
    assert parent.info.status == "KILLED"
    assert "rank_map.json" in {file.path for file in client.list_artifacts(parent.info.run_id)}
