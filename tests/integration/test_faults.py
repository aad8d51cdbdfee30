"""What a search survives of its trials, workers, machines and clocks: each a real process that is killed or misled.

The trials are looked up in a table; all else is a real search. ``test_storage_faults`` has the faults of storage.
"""

from __future__ import annotations

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
from tests.services import patient
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
    with limited(0.05):
        pass
    time.sleep(0.1)
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


# On a cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without workers, and one machine of two CPUs."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    made = patient(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def machine(cluster: Any) -> Iterator[Any]:
    """A machine of two CPUs."""
    node = patient(lambda: cluster.add_node(num_cpus=2))
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


@pytest.mark.slow
def test_a_worker_killed_by_its_trial_and_one_that_hears_nothing(cluster: Any, machine: Any, tmp_path: Path) -> None:
    """A trial that kills its worker is tried once more, and kills again; one that never returns is ended.

    That a worker died when it had long been silent does not say that its trial took too long.
    """
    accidents = {"2": "late", "4": "die", "6": "deaf", "8": "hang", "9": "exhaust", "10": "nan"}
    search = plan(tmp_path, trials=24, address=cluster.address, minutes=0.05, seconds=0.1, accidents=accidents)
    search.finish(400)
    trials = check_study(search.study(), 24)
    reasons = {trial.index: str(trial.reason) for trial in trials if trial.state == "FAIL"}
    assert sorted(reasons) == [2, 4, 6, 8, 9, 10]
    assert "its worker died" in reasons[2]
    assert "its worker died" in reasons[4]
    assert "resources.trial_minutes" in reasons[8]
    assert "resources.trial_minutes" in reasons[6]
    assert "allocate" in reasons[9]
    check_mlflow(uri(tmp_path), search.study())
