"""What a search survives of its trials, workers, machines and clocks: each a real process that is killed or misled.

The trials are looked up in a table; all else is a real search. ``test_storage_faults`` has the faults of storage.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ranksearch.engine import attempt, overdue
from ranksearch.engine.limit import Overdue, limited
from ranksearch.trial import Failure, Outcome, Task
from tests.driving import Plan, check_mlflow, check_study
from tests.services import add_machine, patient
from tests.studies import TABLE, Lookup

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]


def plan(folder: Path, *, trials: int, address: str | None = None, minutes: float | None = None, **more: Any) -> Plan:
    resources = {"engine": "local"} if address is None else {"engine": "ray", "address": address}
    sections = {
        "budget": {"trials": trials},
        "strategy": {"name": "random", "batch": 4},
        "resources": resources | {"trial_minutes": minutes},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "deterministic": False,
    }
    return Plan(folder=str(folder), storage=str(folder), sections=sections, **more)


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def test_a_limit_interrupts_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    timer = signal.setitimer(signal.ITIMER_REAL, 500)
    with pytest.raises(Overdue), limited(0.05):
        time.sleep(30)
    assert time.monotonic() - began < 10
    with limited(1.0):
        pass
    time.sleep(1.1)
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(KeyError), limited(10, deadly=tmp_path / "mark"):
        raise KeyError
    assert (tmp_path / "mark").read_text() == ""
    assert 100 < signal.getitimer(signal.ITIMER_REAL)[0] < 500, "another's timer goes on"
    signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_process_that_ends_itself_says_so(tmp_path: Path) -> None:
    program = f"""
import pathlib, signal, time
from ranksearch.engine import limit
limit.GRACE_S = 0.1
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGALRM}})
with limit.limited(0.1, deadly=pathlib.Path({str(tmp_path / "mark")!r})):
    time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, timeout=50)
    assert ended.returncode == 1
    assert "Timeout" in (tmp_path / "mark").read_text()


def test_a_trial_that_takes_too_long_fails_and_is_not_tried_again() -> None:
    def slow(task: Task) -> Outcome:
        with suppress(Exception):  # as a user's own code may have it
            time.sleep(30)
        return Lookup()()(task)

    task = Task(number=0, choices=TABLE.dense, seed=0)
    assert attempt(slow, task, limit_s=0.05) == overdue(0.05)
    assert overdue(90.0) == Failure(reason="it took longer than resources.trial_minutes=1.5")


@pytest.mark.slow
def test_trials_that_go_wrong_in_this_process(tmp_path: Path) -> None:
    accidents = {"2": "nan", "3": "inf", "5": "exhaust", "7": "hang"}
    search = plan(tmp_path, trials=10, minutes=0.05, accidents=accidents)
    search.finish()
    trials = check_study(search.study(), 10)
    reasons = {trial.index: trial.reason for trial in trials if trial.state == "FAIL"}
    assert sorted(reasons) == [2, 3, 5, 7]
    assert "finite loss" in str(reasons[2])
    assert "finite loss" in str(reasons[3])
    assert "allocate" in str(reasons[5])
    assert reasons[7] == "it took longer than resources.trial_minutes=0.05"
    assert len(search.study().trials()) == 10, "what a trial itself does wrong it would do again"
    check_mlflow(uri(tmp_path), search.study())


@pytest.mark.slow
def test_a_driver_killed_again_and_again(tmp_path: Path) -> None:
    search = plan(tmp_path, trials=40, seconds=0.1)
    for evaluations in (3, 11, 24):
        driver = search.start()
        search.wait(evaluations, driver)
        driver.kill()
        driver.wait()
    search.finish()
    trials = check_study(search.study(), 40)
    assert len(search.study().trials()) <= 43, "each kill costs a trial at most"
    assert sum(trial.state == "COMPLETE" for trial in trials) == 40
    check_mlflow(uri(tmp_path), search.study())


@pytest.mark.slow
def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """An hour back, then a day ahead, in the middle of trials; a trial's limit goes by a clock that does not jump."""
    offset = tmp_path / "offset"

    def jump(seconds: int) -> None:
        (tmp_path / "part").write_text(str(seconds))
        (tmp_path / "part").replace(offset)

    jump(0)
    search = plan(tmp_path, trials=24, seconds=0.1, minutes=2.0, held=True)
    driver = search.start("tests.clock", str(offset))
    try:
        for trials, seconds in ((4, -3600), (11, 86400)):
            search.release(trials)
            search.wait(trials + 1, driver)
            jump(seconds)
        search.release()
        assert driver.wait(240) == 0, search.log
    finally:
        driver.kill()
        driver.wait()
    study = search.study()
    trials = check_study(study, 24)
    starts = [trial.start_ms for trial in trials]
    assert starts != sorted(starts), "the clock did go back"
    assert starts[-1] - starts[0] > 80_000_000, "and ahead"
    assert {trial.state for trial in trials} == {"COMPLETE"}
    check_mlflow(uri(tmp_path), study)


# On a cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without workers."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    made = patient(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def machine(cluster: Any) -> Any:
    """The one machine of two CPUs."""
    for node in cluster.worker_nodes:
        return node
    return add_machine(cluster)


@pytest.mark.slow
def test_a_worker_killed_by_its_trial_and_one_that_hears_nothing(cluster: Any, machine: Any, tmp_path: Path) -> None:
    """A trial that kills its worker is tried once more, and kills again; one that never returns is ended.

    That a worker died when it had long been silent does not say that its trial took too long.
    """
    accidents = {"2": "late", "4": "die", "6": "deaf", "8": "hang", "9": "exhaust", "10": "nan"}
    search = plan(tmp_path, trials=16, address=cluster.address, minutes=0.1, seconds=0.1, accidents=accidents)
    search.finish(400)
    trials = check_study(search.study(), 16)
    reasons = {trial.index: str(trial.reason) for trial in trials if trial.state == "FAIL"}
    assert sorted(reasons) == [2, 4, 6, 8, 9, 10]
    assert "its worker died" in reasons[2]
    assert "its worker died" in reasons[4]
    assert "resources.trial_minutes" in reasons[8]
    assert "resources.trial_minutes" in reasons[6]
    assert "allocate" in reasons[9]
    check_mlflow(uri(tmp_path), search.study())


@pytest.mark.slow
def test_machines_come_and_go(cluster: Any, machine: Any, tmp_path: Path) -> None:
    """One joins late and is used, the first is killed with all that it runs, the search goes on to its end."""
    search = plan(tmp_path, trials=24, address=cluster.address, seconds=0.1, held=True)
    driver = search.start()
    try:
        search.wait(2, driver)
        first = search.workers()
        assert len(first) == 2
        add_machine(cluster)
        search.wait(4, driver)
        assert len(search.workers()) == 4, "the machine that joined is used"
        cluster.remove_node(machine, allow_graceful=False)
        deadline = time.monotonic() + 120
        while any(Path(f"/proc/{process}").exists() for process in first):
            assert time.monotonic() < deadline, "the workers of a machine end with it"
            time.sleep(0.1)
        search.release()
        assert driver.wait(240) == 0, search.log
    finally:
        driver.kill()
        driver.wait()
    trials = check_study(search.study(), 24)
    lost = [trial for trial in search.study().trials() if trial.retry]
    assert len(lost) >= 2, "what the machine took along"
    assert all("its worker died" in str(trial.reason) for trial in lost)
    assert {trial.state for trial in trials} == {"COMPLETE"}
    check_mlflow(uri(tmp_path), search.study())


@pytest.mark.slow
def test_a_driver_of_a_cluster_killed(cluster: Any, machine: Any, tmp_path: Path) -> None:
    search = plan(tmp_path, trials=40, address=cluster.address, seconds=0.2)
    driver = search.start()
    try:
        search.wait(10, driver)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    search.finish(400)
    trials = check_study(search.study(), 40)
    assert {trial.state for trial in trials} == {"COMPLETE"}
    check_mlflow(uri(tmp_path), search.study())
