"""The study against plain Optuna, SciPy and brute force, on both kinds of storage, damaged ones too."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy.stats import binomtest

from ranksearch.errors import RanksearchError, StudyError
from ranksearch.storage import Store
from ranksearch.study import INTERRUPTED, Study
from ranksearch.trial import Failure, Outcome, Proposal, interval
from tests.conftest import REPOSITORY
from tests.studies import TABLE, setting_of, space_of
from tests.tables import table_outcome

LIMITED = space_of(budget={"trials": 40, "max_macs_ratio": 0.6, "max_drop": 45.0})


@pytest.fixture(params=["journal", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Store(tmp_path / "studies" if request.param == "journal" else f"sqlite:///{tmp_path}/studies.db")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a study named ``one`` with three complete trials; its store is ``tmp_path``."""
    filled(Store(tmp_path).create("one", setting_of(LIMITED)), 3)
    return tmp_path / "studies" / "one" / "journal.log"


def some_choices(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(rng.integers(len(layer.candidates))) for layer in TABLE.layers) for _ in range(count)]


def filled(study: Study, count: int) -> Study:
    for choices in some_choices(count):
        index = len(study.trials())
        trial = study.begin(Proposal(choices=choices, origin="test", note={"k": [1]}), index=index)
        study.finish(trial, table_outcome(TABLE, choices))
    return study


def plain(store: Store, name: str) -> optuna.Study:
    """The study as Optuna by itself opens it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if store.url:
            return optuna.load_study(study_name=name, storage=RDBStorage(store.url))
        backend = JournalFileBackend(str(store.folder / "studies" / name / "journal.log"))
        return optuna.load_study(study_name=name, storage=JournalStorage(backend))


def test_plain_optuna_reads_the_study(store: Store) -> None:
    study = filled(store.create("one", setting_of(LIMITED)), 30)
    failed = study.begin(Proposal(choices=TABLE.dense, origin="test"), index=30)
    study.finish(failed, Failure(reason="ValueError: a kernel holds NaN"))
    study.begin(Proposal(choices=TABLE.dense, origin="test"), index=31)

    theirs = plain(store, "one")
    assert [direction.name for direction in theirs.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert theirs.metric_names == ["accuracy", "macs"]
    states = [trial.state for trial in theirs.trials]
    assert states == [TrialState.COMPLETE] * 30 + [TrialState.FAIL, TrialState.RUNNING]
    for trial, choices in zip(theirs.trials, some_choices(30), strict=False):
        outcome = table_outcome(TABLE, choices)
        assert trial.values == pytest.approx([outcome.accuracy_search, outcome.macs], rel=1e-12)
        assert trial.params == {layer.name: i for layer, i in zip(TABLE.layers, choices, strict=True)}
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        assert trial.datetime_complete >= trial.datetime_start
    assert theirs.trials[30].user_attrs["reason"] == "ValueError: a kernel holds NaN"
    feasible_front = {trial.number for trial in study.front_trials()}
    assert feasible_front == {trial.number for trial in theirs.best_trials}, "Optuna knows of the limits"


def test_what_is_written_is_read_back(store: Store) -> None:
    study = store.create("one", setting_of(LIMITED))
    first = study.begin(Proposal(choices=TABLE.dense, origin="energy", note={"a": {"b": [1, 2]}}), index=0)
    outcome = replace(table_outcome(TABLE, TABLE.dense), weights="trial-00000.safetensors", details={"factors": "x"})
    ended = [study.finish(first, outcome)]
    second = study.begin(Proposal(choices=some_choices(1)[0], origin="optuna"), index=1, attempt=1)
    ended.append(study.finish(second, Failure(reason="killed", interrupted=True)))
    third = study.begin(Proposal(choices=some_choices(2)[1], origin="optuna"), index=2)
    ended.append(study.finish(third, Failure(reason="killed", interrupted=True)))

    again = store.open("one")
    assert again.setting == study.setting
    assert again.uid == study.uid
    trials = again.trials()
    assert trials == ended, "to the millisecond"
    assert [t.state for t in trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert trials[0].outcome == outcome
    assert trials[0].proposal == first.proposal
    assert [t.retry for t in trials] == [False, False, True], "a proposal is tried once more, not twice"
    assert [(t.index, t.attempt) for t in trials] == [(0, 0), (1, 1), (2, 0)]
    assert all(0 < t.start_ms <= t.end_ms for t in trials)


def test_recovery_ends_what_was_running(store: Store) -> None:
    study = filled(store.create("one", setting_of(LIMITED)), 2)
    study.begin(Proposal(choices=some_choices(3)[2], origin="test"), index=2)
    known = study.begin(Proposal(choices=some_choices(4)[3], origin="test"), index=3)
    outcome = table_outcome(TABLE, known.proposal.choices)
    trial_id = plain(store, "one").trials[3]._trial_id
    # As a driver leaves it that dies after it wrote the outcome, and before it wrote the state.
    study._storage.set_trial_user_attr(trial_id, "outcome", outcome.to_json())

    again = store.open("one")
    before = again.trials()[:2]
    assert [(t.number, t.state, t.reason, t.retry) for t in again.recover()] == [
        (2, "FAIL", INTERRUPTED, True),
        (3, "COMPLETE", None, False),
    ]
    assert again.recover() == []
    trials = store.open("one").trials()
    assert trials[:2] == before
    assert [t.state for t in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[3].outcome == outcome
    limits = again.constraints(outcome)
    assert trials[3].constraints == (limits["max_drop"], limits["max_macs_ratio"])


def test_constraints_hold_at_the_limit_itself() -> None:
    study = Store().create("one", setting_of(LIMITED))
    dense = study.setting.dense
    at = Outcome(
        accuracy_search=dense["accuracy_search"] - 0.45, loss=1.0, macs=int(0.6 * dense["macs"]), params=1, seconds=0.0
    )
    over = replace(at, macs=at.macs + int(0.01 * dense["macs"]), accuracy_search=at.accuracy_search - 0.01)
    limits, broken = study.constraints(at), study.constraints(over)
    assert limits["max_macs_ratio"] <= 0
    assert limits["max_drop"] <= 0, "0.45 is 45 points, whatever the rounding"
    assert broken["max_macs_ratio"] == pytest.approx(0.01, abs=1e-4)
    assert broken["max_drop"] == pytest.approx(1.0)


@pytest.mark.parametrize("objectives", [["accuracy", "macs"], ["loss", "params"], ["accuracy", "macs", "params"]])
def test_front_by_brute_force(objectives: list[str]) -> None:
    space = space_of(objectives=objectives, budget={"max_macs_ratio": 0.7})
    study = filled(Store().create("one", setting_of(space)), 40)
    trials = study.trials()
    points = {
        t.number: [
            {"accuracy": -t.outcome.accuracy_search, "loss": t.outcome.loss, "macs": t.outcome.macs,
             "params": t.outcome.params}[name] for name in objectives
        ]
        for t in trials
        if t.outcome is not None and t.outcome.macs <= 0.7 * TABLE.dense_macs
    }  # fmt: skip
    front = {
        number
        for number, own in points.items()
        if not any(all(x <= y for x, y in zip(p, own, strict=True)) and p != own for p in points.values())
    }
    assert 1 < len(front) < len(points) < 40
    assert {t.number for t in study.front_trials()} == front
    frame = study.front()
    assert set(frame["trial"]) == front
    assert list(frame["macs"]) == sorted(frame["macs"])
    everything = study.trials_frame()
    assert set(everything.loc[everything["on_front"], "number"]) == front
    assert set(everything.loc[everything["feasible"], "number"]) == set(points)


def test_hypervolume_by_sampling_the_box() -> None:
    study = filled(Store().create("one", setting_of(space_of())), 25)
    trials = study.trials()
    rng = np.random.default_rng(0)
    accuracy, macs = rng.random(100_000), rng.random(100_000) * TABLE.dense_macs
    dominated = np.zeros(100_000, dtype=bool)
    for t in trials:
        assert t.outcome is not None
        dominated |= (t.outcome.accuracy_search >= accuracy) & (t.outcome.macs <= macs)
    assert study.hypervolume(trials) == pytest.approx(dominated.mean(), abs=0.006)
    assert study.hypervolume([]) == 0.0


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (1, 10), (450, 500), (9162, 10_000), (10, 10)])
def test_interval_is_wilsons(correct: int, images: int) -> None:
    theirs = binomtest(correct, images).proportion_ci(confidence_level=0.95, method="wilson")
    assert interval(correct / images, images) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_no_interval_without_images() -> None:
    assert all(math.isnan(x) for x in (*interval(0.5, 0), *interval(math.nan, 10)))


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a b", "ä", "x" * 101])
def test_bad_names(name: str, tmp_path: Path) -> None:
    for use in (lambda: Store(tmp_path).open(name), lambda: Store(tmp_path).create(name, setting_of(space_of()))):
        with pytest.raises(StudyError, match="1 to 100 letters"):
            use()
    assert not list(tmp_path.rglob("*.log"))


def test_unknown_and_taken_names(store: Store) -> None:
    with pytest.raises(StudyError, match=r"'one' in .*, found: none"):
        store.open("one")
    store.create("one", setting_of(space_of()))
    with pytest.raises(StudyError, match="must have a new name, 'one' exists"):
        store.create("one", setting_of(space_of()))
    with pytest.raises(StudyError, match="found: one"):
        store.open("two")
    assert store.names() == ["one"]
    with store.reserved("one", exact=False) as name:
        assert name == "one-2"
    with store.reserved("two", exact=False) as name:
        assert name == "two"
    with pytest.raises(StudyError, match="must have a new name, 'one' exists"), store.reserved("one", exact=True):
        raise AssertionError


def test_studies_of_one_name_share_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    stores = [Store(), Store("sqlite:///a.db"), Store("sqlite:///b.db")]
    studies = [store.create("one", setting_of(LIMITED)) for store in stores]
    assert len({study.folder for study in studies}) == 3
    with studies[0].driving(), studies[1].driving(), studies[2].driving():
        assert Store(f"sqlite:///{tmp_path}/a.db").open("one").folder == studies[1].folder
    urls = [f"postgresql://{who}host:5432/searches" for who in ("", "me@", "me:secret@", "you:other@")]
    assert len({Store(url).folder_of("one") for url in urls}) == 1


def test_a_name_is_held_from_the_start(store: Store) -> None:
    """Two searches of one space at once: the second gets the next number, or an error if it insists."""
    again = Store(store.url or store.folder)
    with store.reserved("one", exact=False) as first:
        assert store.names() == [], "a name that is held is no study yet"
        with again.reserved("one", exact=False) as second:
            again.create(second, setting_of(space_of()))
        with (
            pytest.raises(StudyError, match=r"'one' is being prepared by process \d+ on"),
            again.reserved("one", exact=True),
        ):
            raise AssertionError
        store.create(first, setting_of(space_of()))
    assert (first, second) == ("one", "one-2")
    assert store.names() == ["one", "one-2"]
    with store.open("one").driving():
        pass


def test_a_name_is_given_back_by_what_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.reserved("one", exact=True):
        raise ZeroDivisionError
    assert not list(store.folder.glob("studies/*"))
    with store.reserved("one", exact=True) as name:
        assert name == "one"


RESERVE = """
import os, sys
from ranksearch.storage import Store
with Store(sys.argv[1]).reserved("one", exact=True):
    os.kill(os.getpid(), 9)
"""


def test_a_killed_preparation_blocks_no_name(store: Store) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RESERVE, store.url or str(store.folder)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    (store.folder_of("one") / "journal.part").write_text('{"half a')
    assert store.names() == []
    with store.reserved("one", exact=True) as name:
        filled(store.create(name, setting_of(space_of())), 2)
    assert len(store.open("one").trials()) == 2
    assert not (store.folder_of("one") / "journal.part").exists()


CREATE = """
import os, sys
from optuna.storages import JournalStorage, RDBStorage
from ranksearch.storage import Store
from tests.studies import setting_of, space_of

left = int(sys.argv[2])

def killing(kind, method):
    write = getattr(kind, method)
    def killed(*given):
        global left
        made = write(*given)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return made
    setattr(kind, method, killed)

for kind in (JournalStorage, RDBStorage):
    for method in ("create_new_study", "set_study_system_attr", "set_study_user_attr"):
        killing(kind, method)
store = Store(sys.argv[1])
with store.reserved("one", exact=True) as name:
    store.create(name, setting_of(space_of()))
"""


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_driver_killed_while_it_creates_a_study_blocks_no_name(store: Store, writes: int) -> None:
    store.create("two", setting_of(space_of()))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CREATE, store.url or str(store.folder), str(writes)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert store.names() == ["two"]
    with pytest.raises(StudyError, match="found: two"):
        store.open("one")
    with store.reserved("one", exact=False) as name:
        assert name == "one"
        filled(store.create(name, setting_of(space_of())), 2)
    assert store.names() == ["one", "two"]
    assert len(store.open("one").trials()) == 2


def test_a_study_that_another_machine_makes_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Store(f"sqlite:///{tmp_path}/studies.db")
    store.create("two", setting_of(space_of()))
    optuna.create_study(study_name="one", storage=RDBStorage(str(store.url)))
    with pytest.raises(StudyError, match="'one' exists"), store.reserved("one", exact=True):
        raise AssertionError
    with monkeypatch.context() as stale:
        stale.setattr(Store, "names", lambda self: [])
        with pytest.raises(StudyError, match="another process has just made"):
            store.create("one", setting_of(space_of()))
        with pytest.raises(StudyError, match="another process has just made"):
            store.create("one", setting_of(space_of()))
    assert store.names() == ["one", "two"]


def test_many_searches_at_once_get_a_name_each(tmp_path: Path) -> None:
    def prepare(folder: Path, i: int) -> str:
        store = Store(folder)
        with suppress(ZeroDivisionError), store.reserved("one", exact=False) as name:
            if i % 2 == 0:
                raise ZeroDivisionError
            store.create(name, setting_of(space_of()))
            return name
        return ""

    for attempt in range(8):  # names given back and folders removed under one another's feet
        folder = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            names = [name for name in pool.map(partial(prepare, folder), range(24)) if name]
        assert len(names) == 12
        assert sorted(names) == Store(folder).names()


def test_what_optuna_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"sqlite:///{tmp_path}/studies.db")
    monkeypatch.setenv("HOME", str(tmp_path))
    study = store.create("one", setting_of(space_of()))
    with monkeypatch.context() as stale:
        stale.setattr(Store, "names", lambda self: [])  # another machine's study, made since this one looked
        with pytest.raises(StudyError, match="another process has just made one of this name"):
            store.create("one", setting_of(space_of()))
    with closing(sqlite3.connect(tmp_path / "studies.db")) as database:
        database.execute("DROP TABLE trials")
        database.commit()
    with pytest.raises(StudyError, match=r"studies\.db cannot be used: .*no such table.*resumed"), store.explained():
        study.begin(Proposal(choices=TABLE.dense, origin="test"), index=0)


def test_a_budget_is_not_cut_below_what_was_made(store: Store) -> None:
    study = filled(store.create("one", setting_of(LIMITED)), 3)
    study.extend(2)
    assert store.open("one").space.budget.trials == 3
    study.extend(9)
    assert store.open("one").space.budget.trials == 9


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe garbage\n",
        b"{}\n",
        b"[]\n",
        b'"text"\n',
        b"null\n",
        b'{"op_code": 99, "worker_id": "x"}\n',
        b'{"op_code": 0, "worker_id": "x", "study_name": "one", "directions": [1, 2]}\n',
        b"",
    ],
)
def test_damaged_journals(content: bytes, journal: Path, tmp_path: Path) -> None:
    journal.write_bytes(content)
    with pytest.raises(StudyError, match=r"the study one in .* cannot be read"):
        Store(tmp_path).open("one")
    assert journal.read_bytes() == content, "what cannot be read is left as it is"


@pytest.mark.parametrize("damage", ["{}", "not JSON", '{"space": {"model": {"name": 3}}}', "[1]", "null"])
def test_damaged_settings(damage: str, journal: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if "ranksearch" in line.get("user_attr", {}):
            line["user_attr"]["ranksearch"] = damage
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RanksearchError):
        Store(tmp_path).open("one")


def test_unreadable_studies(journal: Path, tmp_path: Path) -> None:
    journal.unlink()
    journal.mkdir()
    with pytest.raises(StudyError, match="cannot be read"):
        Store(tmp_path).open("one")


def test_storage_that_cannot_be_reached() -> None:
    with pytest.raises(StudyError, match=r"cannot reach the storage sqlite:////nowhere/x.db.*Check --storage"):
        Store("sqlite:////nowhere/x.db").names()
    with pytest.raises(StudyError) as caught:
        Store("nonsense://user:secret@host/x").names()
    assert "secret" not in str(caught.value)
    with pytest.raises(StudyError, match="StorageInternalError"), Store(":memory:").explained():
        raise optuna.exceptions.StorageInternalError  # says nothing


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "studies").write_text("a file in the way")
    with pytest.raises(StudyError, match="cannot write the study one"):
        Store(tmp_path).create("one", setting_of(space_of()))
    assert [path.name for path in tmp_path.iterdir()] == ["studies"]


def test_a_full_disk_leaves_no_study(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StudyError, match=r"cannot write the study one .*Check the space left"):
            Store(tmp_path).create("one", setting_of(space_of()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Store(tmp_path).names() == []
    Store(tmp_path).create("one", setting_of(space_of()))


def test_half_written_last_line_is_mended(journal: Path, tmp_path: Path) -> None:
    whole = journal.read_bytes()
    whole_trials = Store(tmp_path).open("one").trials()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = tmp_path / "copy" / "studies" / "one" / "journal.log"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(whole[:cut])
        study = Store(tmp_path / "copy").open("one")
        assert copy.read_bytes() == whole[:last]
        assert study.trials()[:2] == whole_trials[:2]
        study.recover()
        filled(study, 4)
        states = [t.state for t in Store(tmp_path / "copy").open("one").trials()]
        assert states == ["COMPLETE"] * 7, "what is written after it can be read"


def test_reading_waits_for_a_line_that_is_being_written(journal: Path, tmp_path: Path) -> None:
    """A reader must not take the half of a line that a living driver has written for the rest of a dead one."""
    import fcntl
    import threading

    whole = journal.read_bytes()
    with journal.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        journal.write_bytes(whole[:-20])
        reader = threading.Thread(target=lambda: Store(tmp_path).open("one"))
        reader.start()
        reader.join(timeout=0.3)
        assert reader.is_alive()
        with journal.open("ab") as file:
            file.write(whole[-20:])
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert journal.read_bytes() == whole


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    study = Store(tmp_path).create("one", setting_of(space_of()))
    with (
        study.driving(),
        pytest.raises(StudyError, match=r"driven by process \d+ on"),
        Store(tmp_path).open("one").driving(),
    ):
        pass
    with study.driving():
        pass


def test_extending(store: Store) -> None:
    study = store.create("one", setting_of(LIMITED))
    study.extend(77)
    assert store.open("one").space.budget.trials == 77
    assert store.open("one").space.budget.max_drop == 45.0
    with pytest.raises(StudyError, match="at least one"):
        study.extend(0)
    assert store.open("one").space.budget.trials == 77
