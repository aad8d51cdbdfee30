"""The engine of many workers: Ray Tune, driven by a ``Searcher`` of ours over the source of tasks.

One Tune trial is one worker for as long as it lives: it makes its evaluator once, says so in an empty report, then
takes chunks of tasks from a mailbox and reports their results step by step. Before that report it has no tasks: it
may wait for resources that others hold, and tasks would wait with it. A Tune trial for each chunk, with
``reuse_actors``, would lose warm workers: Tune keeps at most one actor without a trial waiting for it, so whenever a
synchronous batch ends all other workers are stopped, and load network, data and factors anew for the next.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle as cloudpickle
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranksearch.engine import Factory, Source, brief, limit_s, overdue, reason
from ranksearch.engine.cluster import carried, cluster, nodes, quiet
from ranksearch.engine.limit import GRACE_S
from ranksearch.engine.meter import Meter
from ranksearch.engine.resources import workers
from ranksearch.engine.worker import Mailbox, Worker, is_marked
from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec
from ranksearch.trial import DONE, WAIT, Failure, Outcome, Task

_CHUNK_SECONDS = 1.0
"""How long a chunk of tasks may keep a worker."""
_NODES_SECONDS = 2.0
"""How often the machines of the cluster are counted."""
_ASKING_SECONDS = 60.0
"""How long a machine may take to say why its worker ended."""
_FRUITLESS_WORKERS = 3
"""How many workers in a row may die before their first result."""


class RayEngine:
    """Evaluates on Ray workers, on this machine or on a cluster."""

    def __init__(self, spec: ResourcesSpec, meter: Meter | None = None) -> None:
        self._spec = spec
        self._meter = meter

    def run(self, factory: Factory, source: Source) -> None:
        """Evaluate the tasks of ``source`` until it is DONE; see :class:`~ranksearch.engine.Engine`."""
        with quiet(self._spec.address), cluster(self._spec), self._meter or nullcontext():
            actor: Any = ray.remote(num_cpus=0)(Mailbox)
            # Beside the driver: Ray would put it on any machine, and all workers would end with that one.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            mailbox = actor.options(scheduling_strategy=here).remote()
            try:
                _fit(self._spec, factory, source, mailbox, self._meter)
            except _Stopped as stopped:
                raise stopped.error from None


def _fit(spec: ResourcesSpec, factory: Factory, source: Source, mailbox: Any, meter: Meter | None) -> None:
    """Run Tune, in a folder that is left to nobody, until the source is DONE."""
    worker = tune.with_parameters(Worker, factory=factory, mailbox=mailbox, limit_s=limit_s(spec))
    dispatcher = _Dispatcher(source, _Capacity(spec), mailbox, spec.gpus_per_trial, limit_s(spec), meter)
    with tempfile.TemporaryDirectory(prefix="ranksearch-tune-") as folder:
        tune.Tuner(
            tune.with_resources(worker, _placement(spec)),
            tune_config=tune.TuneConfig(search_alg=dispatcher, num_samples=-1),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                stop=_NoneLeft(dispatcher),
                callbacks=[_Coroner(dispatcher)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


class _Capacity:
    """How many workers the cluster holds now: machines come and go while a search runs.

    Raises:
        EngineError: when it is made, not even one worker fits, or fewer than asked for.
    """

    def __init__(self, spec: ResourcesSpec) -> None:
        self._spec = spec
        self._count = workers(spec, nodes())
        self._counted = time.monotonic()

    def __call__(self) -> int:
        """As many as asked for, or as many as fit the machines that are there; at least as many as once did."""
        if self._spec.workers is None and time.monotonic() - self._counted > _NODES_SECONDS:
            self._counted = time.monotonic()
            with suppress(EngineError):  # a worker that lost its machine waits until another one joins
                self._count = max(self._count, workers(self._spec, nodes()))
        return self._count


def _placement(spec: ResourcesSpec) -> tune.PlacementGroupFactory:
    """What a worker takes of one machine, and which machines have it."""
    wanted = {"CPU": float(spec.cpus_per_trial), "GPU": spec.gpus_per_trial, "memory": float(spec.memory_bytes)}
    bundle = {name: amount for name, amount in wanted.items() if amount}
    labels: dict[str, Any] = {"bundle_label_selector": [dict(spec.labels)]} if spec.labels else {}
    return tune.PlacementGroupFactory([bundle], **labels)


class _Stopped(BaseException):
    """Carries an error through Tune, which would wrap or retry any other, to the engine's caller."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Dispatcher(Searcher):
    """Starts workers, keeps them in tasks, and hands results to the source; runs in the driver."""

    def __init__(
        self,
        source: Source,
        capacity: _Capacity,
        mailbox: Any,
        gpu_share: float,
        limit_s: float | None,
        meter: Meter | None = None,
    ) -> None:
        super().__init__()
        self._meter = meter
        self._source = source
        self._capacity = capacity
        self._mailbox = mailbox
        self._limit_s = limit_s
        self._gpu_share = gpu_share
        self._running: dict[str, dict[int, Task]] = {}
        """Worker to the tasks it has, by number."""
        self._starting: set[str] = set()
        """Workers that have not reported yet: they may still wait for resources, so they get no tasks."""
        self._proven: set[str] = set()
        """Workers that have had a result."""
        self._heard: dict[str, float] = {}
        """When a worker was last sent tasks or heard of, seconds."""
        self._marks: dict[str, str] = {}
        """Worker to the file on its machine that tells that it ended itself."""
        self._fruitless = 0
        """How many workers in a row died before they had a result."""
        self._ready: list[Task] = []
        """Tasks taken from the source that no worker has yet."""
        self._exhausted = False
        self._chunk = 1
        self._suspects: set[tuple[int, int]] = set()
        """Proposals that were lost with a worker: one of them may have killed it, so each is sent by itself when it is
        tried again, and takes no other along."""
        self._places: dict[str, str] = {}
        """Worker to the machine and GPU whose memory it shares with the others there."""
        self._outgrown: dict[str, list[Task]] = {}
        """Place to tasks that ran out of memory there: each is tried once more while no other worker there works."""
        self._by_itself: dict[str, Task] = {}
        """Place to the task that is tried so."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher beside its own state, and the source holds files and threads."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Start a worker where one is missing and there is a task for it."""
        wanted = len(self._starting) + 1
        if len(self._running) < self._capacity() and self._refill(wanted) and len(self._ready) >= wanted:
            self._running[trial_id] = {}
            self._starting.add(trial_id)
            self._measure()
            return {"worker": trial_id, "gpu_share": self._gpu_share, "variables": carried()}
        return Searcher.FINISHED if self._exhausted and not self._ready else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record what a worker reports, and keep all workers in tasks."""
        self._starting.discard(trial_id)
        self._heard[trial_id] = time.monotonic()
        if "place" in result:
            self._places[trial_id] = result["place"]
            self._marks[trial_id] = result["mark"]
        self._record(trial_id, result)
        self._feed()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A worker has ended: on request, because it could not start, or because it died."""
        if result and result.get("broken"):
            raise _Stopped(EngineError(f"a worker could not start: {result['broken']}"))
        self._starting.discard(trial_id)
        lost = self._running.pop(trial_id, {})
        if error:
            overran = len(lost) == 1 and self._overran(trial_id)
            if overran:  # that is a result
                self._fruitless = 0
                self._proven.add(trial_id)
            else:
                self._suspects |= {_proposal(task) for task in lost.values()}
            self._chunk = 1
            died = Failure(reason="its worker died (killed, or out of memory)", interrupted=True)
            for task in lost.values():
                self._done(task, overdue(self._limit_s or 0.0) if overran else died)
        self._leave(self._places.pop(trial_id, ""), lost)
        self._feed()

    def _overran(self, worker: str) -> bool:
        """Whether a worker that died ended itself at the time limit: a machine that is lost is silent for long too."""
        silent = time.monotonic() - self._heard.get(worker, math.inf)
        if self._limit_s is None or silent < self._limit_s + GRACE_S or worker not in self._marks:
            return False
        machine = NodeAffinitySchedulingStrategy(self._places[worker].partition("/")[0], soft=False)
        asked: Any = ray.remote(num_cpus=0, max_retries=0)(is_marked)
        try:
            told = asked.options(scheduling_strategy=machine).remote(self._marks[worker])
            return bool(ray.get(told, timeout=_ASKING_SECONDS))
        except RayError:  # the machine is gone
            return False

    def died(self, worker: str, cause: str) -> None:
        """Hear why a worker died, after ``on_trial_complete``; end the search where no worker gets anywhere.

        That its machine was lost says nothing of the worker.
        """
        self._fruitless += worker not in self._proven and "node has died" not in cause
        if self._fruitless >= _FRUITLESS_WORKERS:
            raise _Stopped(
                EngineError(
                    f"{self._fruitless} workers in a row died before their first result, the last of: {cause}. "
                    "Where memory is short, lower resources.workers or evaluation.batch_images; then resume."
                )
            )

    @property
    def finished(self) -> bool:
        """Whether every task is done, and the workers that are left have not even started."""
        return self._exhausted and not self._ready and self._running.keys() <= self._starting

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the study is the record."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a resumed search starts afresh from the study."""

    def _record(self, trial_id: str, result: dict[str, Any]) -> None:
        tasks = self._running.get(trial_id, {})
        results = [(tasks.pop(number), outcome) for number, outcome in result["results"] if number in tasks]
        if results:
            self._fruitless = 0
            self._proven.add(trial_id)
            # At most doubled at a time: the first tasks say little about the next.
            fitting = int(_CHUNK_SECONDS * len(results) / max(result["seconds"], 1e-6))
            self._chunk = max(1, min(fitting, 2 * self._chunk))
        place = self._places.get(trial_id, "")
        for task, outcome in results:
            again = self._by_itself.pop(place, None) is not None
            if not (isinstance(outcome, Failure) and outcome.exhausted):
                self._done(task, outcome)
            elif again:
                self._done(task, replace(outcome, reason=f"{outcome.reason} (also alone on its machine or GPU)"))
            elif self._divided(place):
                self._outgrown.setdefault(place, []).append(task)
            else:
                self._done(task, outcome)

    def _divided(self, place: str) -> bool:
        """Whether a task had less than all the memory there."""
        return 0 < self._gpu_share < 1 or list(self._places.values()).count(place) > 1

    def _rests(self, worker: str) -> bool:
        """Whether a worker gets nothing to do, for a task that needs all the memory where it is."""
        place = self._places.get(worker)
        return place in self._outgrown or place in self._by_itself

    def _leave(self, place: str, lost: Mapping[int, Task]) -> None:
        """A worker is gone: what was to be tried alone there is tried elsewhere where none is left."""
        if (task := self._by_itself.get(place)) is not None and task.number in lost:
            del self._by_itself[place]
        if place not in self._places.values():
            for task in self._outgrown.pop(place, []):
                self._done(task, Failure(reason="its worker died before it could be tried alone", interrupted=True))

    def _try_alone(self) -> None:
        """Send a task that ran out of memory to a worker of its place, as soon as all there have ended their work."""
        for place in [*self._outgrown]:
            here = [worker for worker in self._running if self._places.get(worker) == place]
            if not here or place in self._by_itself or any(self._running[worker] for worker in here):
                continue
            task = self._outgrown[place].pop(0)
            if not self._outgrown[place]:
                del self._outgrown[place]
            self._by_itself[place] = task
            self._running[here[0]] = {task.number: task}
            self._heard[here[0]] = time.monotonic()
            self._mailbox.put.remote(here[0], [task], alone=True)

    def _feed(self) -> None:
        """Send tasks to every worker that has none, or end it where there is nothing more to come."""
        self._try_alone()
        free = [w for w, tasks in self._running.items() if not tasks and w not in self._starting]
        idle = [worker for worker in free if not self._rests(worker)]
        for i, worker in enumerate(idle):
            if self._refill(len(idle) - i):
                self._send(worker)
            elif self._exhausted:
                self._mailbox.put.remote(worker, None)
                self._running.pop(worker)
                self._places.pop(worker, None)
        self._measure()

    def _measure(self) -> None:
        """Tell Prometheus what the workers do."""
        if self._meter is not None:
            begun = len(self._ready) + sum(map(len, self._outgrown.values())) + sum(map(len, self._running.values()))
            busy, starting = sum(map(bool, self._running.values())), len(self._starting)
            states = {"busy": busy, "idle": len(self._running) - busy - starting, "starting": starting}
            self._meter.busy(queued=begun - busy, workers=states)

    def _refill(self, idle: int) -> bool:
        """Take tasks from the source for so many idle workers; whether any is ready.

        Cheap tasks are taken ahead for all the workers, so that they can be dealt out evenly; dear ones never, since
        a strategy proposes better the more outcomes it has seen.
        """
        wanted = idle + (self._chunk - 1) * self._capacity()
        while len(self._ready) < wanted and not self._exhausted:
            try:
                tasks = self._source.take(wanted - len(self._ready))
            except Exception as error:
                raise _Stopped(error) from error
            if tasks is DONE:
                self._exhausted = True
            elif tasks is WAIT:
                if not (self._ready or self._outgrown or any(self._running.values())):
                    raise _Stopped(RuntimeError("the source waits for a running task, and none is running"))
                break
            else:
                self._ready += tasks
                if self._meter is not None:
                    self._meter.proposed(len(tasks))
        return bool(self._ready)

    def _send(self, worker: str) -> None:
        """Send a worker its share of the ready tasks."""
        share = self._ready[: min(self._chunk, math.ceil(len(self._ready) / self._capacity()))]
        innocent = [*takewhile(lambda task: _proposal(task) not in self._suspects, share)]
        tasks = innocent or share[:1]
        self._ready = self._ready[len(tasks) :]
        self._suspects -= {_proposal(task) for task in tasks}
        self._running[worker] = {task.number: task for task in tasks}
        self._heard[worker] = time.monotonic()
        self._mailbox.put.remote(worker, tasks)

    def _done(self, task: Task, result: Outcome | Failure) -> None:
        try:
            self._source.done(task, result)
        except Exception as error:
            raise _Stopped(error) from error


def _proposal(task: Task) -> tuple[int, int]:
    """What a task has in common with the next try of the same proposal, which has another number."""
    return task.index, task.seed


class _NoneLeft(tune.Stopper):
    """Ends Tune where only workers are left that wait to start: they would make an evaluator for nothing."""

    def __init__(self, dispatcher: _Dispatcher) -> None:
        self._dispatcher = dispatcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No worker is ended by what it reports."""
        return False

    def stop_all(self) -> bool:
        """Whether nothing is left to do."""
        return self._dispatcher.finished


class _Coroner(tune.Callback):
    """Tells the dispatcher why a worker died, which Tune does not tell its searcher."""

    def __init__(self, dispatcher: _Dispatcher) -> None:
        self._dispatcher = dispatcher

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died."""
        self._dispatcher.died(trial.trial_id, _cause(trial))


def _cause(trial: Any) -> str:
    """Why a worker died.

    Tune keeps errors of actors and tasks as objects, any other (a runtime environment that cannot be made) as text,
    and both where a trial's files are gathered before they reach its storage.
    """
    if trial.pickled_error_file and Path(trial.pickled_error_file).exists():
        return reason(cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()))
    if trial.error_file and Path(trial.error_file).exists():
        _, _, text = Path(trial.error_file).read_text(encoding="utf-8").partition("\n")
        return brief(text) or "unknown"
    return "unknown"
