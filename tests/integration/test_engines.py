"""Every task is handed back once with what came of it, whatever the engine, and whatever happens to a worker."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from ranksearch.engine import Engine, build_engine, build_map
from ranksearch.engine.resources import check
from ranksearch.errors import EngineError, StudyError
from ranksearch.space import ResourcesSpec
from ranksearch.trial import DONE, WAIT, Failure, Outcome, Signal, Task
from tests.conftest import REPOSITORY
from tests.services import NODE, ray_cluster, ray_node, started
from tests.tables import price_table, table_outcome
from tests.unit.test_prices import network, priced

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]
TABLE = price_table(layers=6, candidates=8)


@dataclass(frozen=True, kw_only=True)
class Factory:
    """An evaluator by the table, with accidents; each call leaves a file in ``folder``."""

    folder: Path
    fail: int = -1
    exhaust: int = -1
    kill: int = -1
    seconds: float = 0.0
    workers: int = 0
    """A task waits until as many have started, a minute at most: a busy machine starts one long after the other."""

    def __call__(self) -> Callable[[Task], Outcome]:
        (self.folder / f"factory-{os.getpid()}-{time.monotonic_ns()}").touch()
        return self._evaluate

    def _evaluate(self, task: Task) -> Outcome:
        if task.seed == self.fail:
            raise ValueError("a kernel holds\nNaN")
        if task.seed == self.exhaust:
            raise MemoryError
        killed = self.folder / "killed"
        if task.seed == self.kill and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        patience = time.monotonic() + 60
        while self.calls < self.workers and time.monotonic() < patience:
            time.sleep(0.05)
        if self.seconds:
            start = time.monotonic_ns()  # one clock for all processes
            time.sleep(self.seconds)
            (self.folder / f"task-{os.getpid()}-{start}-{time.monotonic_ns()}").touch()
        return table_outcome(TABLE, task.choices)

    @property
    def calls(self) -> int:
        return len(list(self.folder.glob("factory-*")))


class Batches:
    """Synchronous batches: the next is handed out when all of the last is done; an interrupted task is tried again."""

    def __init__(self, count: int, batch: int) -> None:
        rng = np.random.default_rng(0)
        self._todo = [
            [_task(rng, i) for i in range(start, min(start + batch, count))] for start in range(0, count, batch)
        ]
        self._ready: list[Task] = []
        self._running: set[int] = set()
        self._next_number = count
        self.tasks: dict[int, Task] = {}
        self.results: dict[int, Outcome | Failure] = {}

    def take(self, limit: int) -> list[Task] | Signal:
        assert limit >= 1
        if not self._ready:
            if self._running:
                return WAIT
            if not self._todo:
                return DONE
            self._ready = self._todo.pop(0)
        taken, self._ready = self._ready[:limit], self._ready[limit:]
        self._running |= {task.number for task in taken}
        self.tasks |= {task.number: task for task in taken}
        return taken

    def done(self, task: Task, result: Outcome | Failure) -> None:
        assert task == self.tasks[task.number]
        self._running.remove(task.number)
        self.results[task.number] = result
        if isinstance(result, Failure) and result.interrupted:
            self._ready.append(Task(number=self._next_number, choices=task.choices, seed=task.seed))
            self._next_number += 1


def _task(rng: np.random.Generator, number: int) -> Task:
    choices = tuple(int(rng.integers(len(layer.candidates))) for layer in TABLE.layers)
    return Task(number=number, choices=choices, seed=number)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two CPUs, for all tests of this file."""
    with ray_cluster(2) as address:
        yield address


def engine(name: Literal["local", "ray"], request: pytest.FixtureRequest, workers: int = 2) -> Engine:
    address = request.getfixturevalue("cluster") if name == "ray" else "local"
    return build_engine(ResourcesSpec(engine=name, workers=workers, address=address))


@pytest.mark.parametrize(("name", "workers"), [("local", 1), ("ray", 1), ("ray", 2)])
@pytest.mark.parametrize("batch", [4, 50])
def test_every_task_comes_back_once(
    name: Literal["local", "ray"], workers: int, batch: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, factory = Batches(50, batch), Factory(folder=tmp_path, fail=7, exhaust=20)
    engine(name, request, workers).run(factory, source)
    assert sorted(source.results) == list(range(50))
    assert source.results.pop(7) == Failure(reason="ValueError: a kernel holds NaN")
    exhausted = source.results.pop(20)
    assert isinstance(exhausted, Failure)
    assert exhausted.reason in ("MemoryError", "MemoryError (also alone on its machine or GPU)")
    assert not exhausted.interrupted
    for number, outcome in source.results.items():
        assert outcome == table_outcome(TABLE, source.tasks[number].choices)
    assert 1 <= factory.calls <= workers, "an evaluator is made once a worker, and kept over batches"


def test_a_source_without_tasks_needs_no_evaluator(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for name in ("local", "ray"):
        factory = Factory(folder=tmp_path)
        engine(name, request).run(factory, Batches(0, 4))
        assert factory.calls == 0


@pytest.mark.parametrize("batch", [3, 40])
def test_a_killed_worker_costs_only_what_it_was_doing(
    batch: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, factory = Batches(40, batch), Factory(folder=tmp_path, kill=11)
    engine("ray", request).run(factory, source)
    lost = {number: r for number, r in source.results.items() if isinstance(r, Failure)}
    assert 11 in lost
    assert all(failure.interrupted and "worker died" in failure.reason for failure in lost.values())
    seeds = [source.tasks[number].seed for number, r in source.results.items() if isinstance(r, Outcome)]
    assert sorted(seeds) == list(range(40)), "every lost task was tried again, with its seed"
    assert factory.calls <= 3, "one new worker for the one that died"


@dataclass(frozen=True, kw_only=True)
class Deadly(Factory):
    """Task 4 kills its worker twice; the first task holds one of two workers until all others are done."""

    def _evaluate(self, task: Task) -> Outcome:
        while task.seed == 0 and not (self.folder / "released").exists():
            time.sleep(0.05)
        if task.seed == 4 and len(kills := list(self.folder.glob("kill-*"))) < 2:
            (self.folder / f"kill-{len(kills)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._evaluate(task)


class Holding(Batches):
    """Lets the first task end when all others are done."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count, count)
        self._folder = folder

    def done(self, task: Task, result: Outcome | Failure) -> None:
        super().done(task, result)
        if len(self._running) == 1 and not self._ready:
            (self._folder / "released").touch()


@pytest.mark.slow
def test_what_was_lost_with_a_worker_is_not_lost_with_the_next(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Four tasks are lost in one chunk, and many others are sent before they are tried again."""
    source = Holding(40, tmp_path)
    engine("ray", request).run(Deadly(folder=tmp_path), source)
    results = source.results.items()
    lost = Counter(source.tasks[number].seed for number, result in results if isinstance(result, Failure))
    assert lost.pop(4) == 2
    assert set(lost.values()) <= {1}, "only the one that kills is lost twice"
    seeds = [source.tasks[number].seed for number, result in results if isinstance(result, Outcome)]
    assert sorted(seeds) == list(range(40))


def test_two_workers_work_at_the_same_time(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, factory = Batches(8, 4), Factory(folder=tmp_path, seconds=1.0, workers=2)
    engine("ray", request).run(factory, source)
    assert factory.calls == 2
    assert all(isinstance(result, Outcome) for result in source.results.values())
    spans = [[int(part) for part in path.name.split("-")[1:]] for path in tmp_path.glob("task-*")]
    assert len(spans) == 8
    pairs = itertools.combinations(spans, 2)
    assert any(one[0] != two[0] and one[1] < two[2] and two[1] < one[2] for one, two in pairs), "never both at work"


def _refuse() -> Callable[[Task], Outcome]:
    raise RuntimeError("the weights are gone")


def test_workers_that_cannot_start_end_the_search(request: pytest.FixtureRequest) -> None:
    with pytest.raises(EngineError, match=r"could not start: RuntimeError: the weights are gone"):
        engine("ray", request).run(_refuse, Batches(4, 4))
    with pytest.raises(RuntimeError, match="the weights are gone"):
        engine("local", request).run(_refuse, Batches(4, 4))


class Broken(Batches):
    """A source whose study's disk is full."""

    def done(self, task: Task, result: Outcome | Failure) -> None:
        raise StudyError("the disk is full")


@pytest.mark.parametrize("name", ["local", "ray"])
def test_an_error_of_the_source_reaches_the_caller(
    name: Literal["local", "ray"], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(StudyError, match="the disk is full"):
        engine(name, request).run(Factory(folder=tmp_path), Broken(4, 4))


def _die() -> Callable[[Task], Outcome]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_workers_that_die_while_they_start_cost_no_proposal(request: pytest.FixtureRequest) -> None:
    source = Batches(4, 4)
    with pytest.raises(EngineError, match=r"3 workers in a row died before their first result.*resources\.workers"):
        engine("ray", request).run(_die, source)
    assert not source.results


BUSY = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
class Busy:
    def ready(self):
        return True

busy = Busy.remote()
ray.get(busy.ready.remote())
print("ready", flush=True)
time.sleep(600)
"""


def test_a_worker_that_waits_for_resources_holds_no_tasks(tmp_path: Path, cluster: str) -> None:
    """Somebody else has one of the two CPUs: the other does all the work, and nobody waits for the second worker."""
    source, factory = Batches(12, 4), Factory(folder=tmp_path)
    with started("-c", BUSY, cluster) as busy:
        assert busy.stdout is not None
        while busy.stdout.readline() != "ready\n":
            assert busy.poll() is None
        build_engine(ResourcesSpec(engine="ray", workers=2, address=cluster)).run(factory, source)
    assert sorted(source.results) == list(range(12))
    assert factory.calls == 1


def test_more_workers_than_fit(tmp_path: Path, cluster: str) -> None:
    source, spec = Batches(4, 4), ResourcesSpec(engine="ray", workers=3, address=cluster)
    with pytest.raises(EngineError, match=r"has 2 CPUs .*: 2 fit at once, found resources\.workers=3\. Lower it to 2"):
        build_engine(spec).run(Factory(folder=tmp_path), source)
    assert not source.tasks


@pytest.mark.slow
def test_a_trial_is_not_split_over_machines(tmp_path: Path) -> None:
    """Two machines of three CPUs have room for two trials of two CPUs, though six CPUs would be enough for three."""
    with ray_cluster(3) as address, ray_node(*NODE, f"--address={address}", "--num-cpus=3"):
        spec = ResourcesSpec(engine="ray", workers=3, cpus_per_trial=2, address=address)
        deadline = time.monotonic() + 120
        while True:
            with pytest.raises(EngineError) as caught:
                build_engine(spec).run(Factory(folder=tmp_path), Batches(8, 4))
            if "2 x 3 CPUs" in str(caught.value) or time.monotonic() > deadline:
                break
        assert "2 x 3 CPUs and 0 GPUs: 2 fit at once" in str(caught.value)
        source = Batches(8, 4)
        build_engine(spec.model_copy(update={"workers": None})).run(Factory(folder=tmp_path), source)
        assert sorted(source.results) == list(range(8))


def test_resources_that_are_not_here_are_told_at_once() -> None:
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    for found in (
        ResourcesSpec(),
        ResourcesSpec(cpus_per_trial=4 * cpus),
        ResourcesSpec(engine="ray", workers=2, cpus_per_trial=4 * cpus),
        ResourcesSpec(engine="ray", cpus_per_trial=4 * cpus, gpus_per_trial=gpus + 1, address="10.0.0.1:6379"),
    ):
        check(found)
    with pytest.raises(EngineError, match=r"finds \d+ with CUDA .*--set resources\.gpus_per_trial=0"):
        check(ResourcesSpec(gpus_per_trial=gpus + 1))
    with pytest.raises(EngineError, match=r"none fits\. Search with --set resources\.gpus_per_trial=0"):
        check(ResourcesSpec(engine="ray", gpus_per_trial=gpus + 1))
    with pytest.raises(EngineError, match=r"none fits\. Lower resources\.cpus_per_trial"):
        check(ResourcesSpec(engine="ray", cpus_per_trial=4 * cpus))
    with pytest.raises(EngineError, match=r"no such label\): none fits\. Start machines with `ray start --labels`"):
        check(ResourcesSpec(engine="ray", labels={"kind": "fast"}))
    with pytest.raises(EngineError, match=r"none fits\. Lower resources\.memory_gb_per_trial"):
        check(ResourcesSpec(engine="ray", memory_gb_per_trial=1e6))


def test_an_error_of_the_system_is_an_interruption(tmp_path: Path) -> None:
    class Full(Factory):
        def _evaluate(self, task: Task) -> Outcome:
            if task.number == 2:
                raise OSError(28, "No space left on device")
            if task.number == 3:
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            return super()._evaluate(task)

    source = Batches(5, 5)
    build_engine(ResourcesSpec()).run(Full(folder=tmp_path), source)
    for number in (2, 3):
        failure = source.results[number]
        assert isinstance(failure, Failure)
        assert failure.interrupted
        assert "No space left" in failure.reason
    seeds = [source.tasks[number].seed for number, r in source.results.items() if isinstance(r, Outcome)]
    assert sorted(seeds) == list(range(5)), "each was tried once more"


def test_a_cluster_too_small_for_one_trial(tmp_path: Path, cluster: str) -> None:
    spec = ResourcesSpec(engine="ray", cpus_per_trial=1000, address=cluster)
    with pytest.raises(EngineError, match=r"needs 1000 CPUs .* has 2 .*Lower resources\.cpus_per_trial"):
        build_engine(spec).run(Factory(folder=tmp_path), Batches(4, 4))


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Halves numbers, with accidents; leaves a file for every process that reads it."""

    folder: Path

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__.update(state)
        (self.folder / f"read-{os.getpid()}").touch()

    def __call__(self, item: int) -> float:
        if item == -1:
            raise StudyError("a number must not be negative")
        if item == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item / 2


@pytest.mark.slow
def test_a_map_over_ray_workers(tmp_path: Path, cluster: str) -> None:
    parallel = build_map(ResourcesSpec(engine="ray", workers=2, address=cluster))
    assert list(parallel(Halving(folder=tmp_path), range(20))) == [i / 2 for i in range(20)]
    readers = {path.name for path in tmp_path.iterdir()}
    assert len(readers) == 2
    assert f"read-{os.getpid()}" not in readers
    with pytest.raises(StudyError, match=r"^a number must not be negative$"):
        list(parallel(Halving(folder=tmp_path), [1, 2, -1, 3]))
    with pytest.raises(EngineError, match=r"died.*Where memory is short, lower"):
        list(parallel(Halving(folder=tmp_path), [1, 2, -2, 3]))
    with pytest.raises(EngineError, match=r"needs 1000 CPUs"):
        list(
            build_map(ResourcesSpec(engine="ray", cpus_per_trial=1000, address=cluster))(Halving(folder=tmp_path), [1])
        )


@pytest.mark.slow
def test_prices_from_ray_workers_are_those_of_this_process(tmp_path: Path, cluster: str) -> None:
    case = priced(*network("small"), tmp_path)
    assert case.measured(map=build_map(ResourcesSpec(engine="ray", workers=2, address=cluster))) == case.measured()


PROGRAM = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from ranksearch.engine import build_engine
from ranksearch.space import ResourcesSpec
from ranksearch.trial import DONE, WAIT, Task
import users_own


class Source:
    left, running = 6, 0

    def take(self, limit):
        if self.left == 0:
            return WAIT if self.running else DONE
        self.left, self.running = self.left - 1, self.running + 1
        return [Task(number=self.left, choices=(), seed=0)]

    def done(self, task, result):
        self.running -= 1
        assert result.details == {"cwd": os.getcwd()}, result


try:
    build_engine(ResourcesSpec(engine="ray", workers=2)).run(users_own.Factory(float(sys.argv[1])), Source())
except KeyboardInterrupt:
    sys.exit(130)
"""

USERS_OWN = """
import os, time
from ranksearch.trial import Outcome


class Factory:
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        return self.evaluate

    def evaluate(self, task):
        if self.seconds:
            open(f"running-{os.getpid()}", "w").close()
        time.sleep(self.seconds)
        details = {"cwd": os.getcwd()}
        return Outcome(accuracy_search=0.5, loss=1.0, macs=1, params=1, seconds=0.0, details=details)
"""


def _program(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A program of a user's, in a folder of its own, as a process group of its own."""
    (folder / "users_own.py").write_text(USERS_OWN)
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "program.py", str(seconds)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _left_behind(folder: Path) -> list[str]:
    """Processes that the program in ``folder`` started, known by its home folder, and that still run."""
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                left.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return left


@pytest.mark.slow
def test_a_run_is_silent_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = _program(tmp_path, seconds=0.0)
    out, err = process.communicate(timeout=500)
    assert (process.returncode, out, err) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"users_own.py", "program.py", "__pycache__", ".cache"}
    assert not _left_behind(tmp_path)


@pytest.mark.slow
def test_ctrl_c_stops_running_work(tmp_path: Path) -> None:
    process = _program(tmp_path, seconds=600.0)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("running-*"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert any("raylet" in command for command in _left_behind(tmp_path))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out, err) == (130, "", "")
    assert not _left_behind(tmp_path)
