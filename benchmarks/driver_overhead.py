"""What the driver costs per trial: trials are looked up in a table, so all of the time is overhead.

Run from the root of the repository: ``python -m benchmarks.driver_overhead [trials]``; it prints Markdown.
Two Ray workers, 18 layers. First, Ray Tune by itself with fewer and empty trials: the time of ``fit``. Then
the engine alone (dispatch to workers and back); the others add proposing (NSGA-II, batches of 4), recording in the
study, and logging to MLflow on SQLite. Their time runs from the first result to the end of the search, so the start of
Ray and of its workers is not in it; it ends when MLflow has written what it was handed.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray import tune

from ranksearch.driver import Driver
from ranksearch.engine import Evaluate, Source, build_engine
from ranksearch.preparation import versions
from ranksearch.rankmap import ModelRecord
from ranksearch.setting import Setting
from ranksearch.space import BudgetSpec, ModelSpec, ResourcesSpec, Space, StrategySpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.table import PriceTable
from ranksearch.tracking import Tracker, View
from ranksearch.trial import DONE, WAIT, Failure, Outcome, Signal, Task
from tests.tables import price_table, table_outcome

LAYERS = 18


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A factory of evaluators by the table."""

    table: PriceTable

    def __call__(self) -> Evaluate:
        return lambda task: table_outcome(self.table, task.choices)


class Timed:
    """A source that notes when results come."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.results = 0
        self.first = self.last = 0.0

    def take(self, limit: int) -> list[Task] | Signal:
        return self._source.take(limit)

    def done(self, task: Task, result: Outcome | Failure) -> None:
        self.first = self.first or time.perf_counter()
        self._source.done(task, result)
        self.last = time.perf_counter()
        self.results += 1


class Batches:
    """Tasks in synchronous batches, with nothing proposed and nothing recorded."""

    def __init__(self, table: PriceTable, trials: int, batch: int) -> None:
        self._table, self._trials, self._batch = table, trials, batch
        self._taken = self._finished = 0

    def take(self, limit: int) -> list[Task] | Signal:
        if self._taken == self._trials:
            return DONE if self._finished == self._taken else WAIT
        end = min(self._trials, (self._finished // self._batch + 1) * self._batch, self._taken + limit)
        tasks = [Task(number=i, choices=self._table.dense, seed=i) for i in range(self._taken, end)]
        self._taken = max(end, self._taken)
        return tasks or WAIT

    def done(self, task: Task, result: Outcome | Failure) -> None:
        self._finished += 1


def nothing() -> None:
    """What is left to do after a row without MLflow."""


def recorded(table: PriceTable, trials: int, folder: Path, tracked: bool) -> tuple[Source, Callable[[], None]]:
    """The driver of a search on the table, with a study in ``folder``."""
    space = Space(
        model=ModelSpec(name="table"),
        budget=BudgetSpec(trials=trials),
        strategy=StrategySpec(name="optuna", batch=4),
        resources=ResourcesSpec(engine="ray", workers=2),
    )
    dense = {"accuracy": 0.92, "accuracy_search": 0.92, "loss": 0.3, "macs": table.dense_macs, "params": 1}
    setting = Setting(
        space=space,
        table=table,
        model=ModelRecord(name="table", input_shape=(3, 32, 32)),
        dense=dense,
        left_dense={},
        classes=10,
        data_digest="",
        dtype="float32",
        versions={},
    )
    study = Store(folder).create("overhead", setting)
    strategy = build_strategy(space.strategy, Terms(seed=space.seed, objectives=tuple(space.objectives)))
    if not tracked:
        return Driver(study, strategy), nothing
    tracker = Tracker(space.tracking, folder=folder)
    return Driver(study, strategy, view=View(study, tracker)), tracker.close


def measure(name: str, table: PriceTable, make: Callable[[Path], tuple[Source, Callable[[], None]]]) -> None:
    """Run one row and print it."""
    with tempfile.TemporaryDirectory() as folder:
        inner, close = make(Path(folder))
        source = Timed(inner)
        start = time.perf_counter()
        build_engine(ResourcesSpec(engine="ray", workers=2)).run(Lookup(table=table), source)
        ended = time.perf_counter()
        close()
        writing = time.perf_counter() - ended
        seconds = source.last - source.first + writing
        show(name, source.results, seconds, ended - start)


def alone(table: PriceTable, trials: int, batch: int, _: Path) -> tuple[Source, Callable[[], None]]:
    """Tasks in batches, and nothing to close."""
    return Batches(table, trials, batch), nothing


def show(name: str, trials: int, seconds: float, total: float) -> None:
    """Print one row."""
    print(f"| {name} | {trials} | {1000 * seconds / trials:.1f} | {total:.1f} |", flush=True)


class Empty(tune.Trainable):
    """A trial that does nothing."""

    def step(self) -> dict[str, object]:
        return {"score": 0.0, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, object]:
        return {}

    def load_checkpoint(self, checkpoint: object) -> None:
        pass

    def reset_config(self, new_config: dict[str, object]) -> bool:
        return True


def measure_tune(name: str, trials: int, reuse_actors: bool) -> None:
    """Run empty trials on Ray Tune with its own settings, and print the row."""
    start = time.perf_counter()
    results: tune.ResultGrid | None = None
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            results = tune.Tuner(
                Empty,
                tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=reuse_actors),
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            ).fit()
            ended = time.perf_counter()
            if results.num_errors:
                raise RuntimeError(f"{results.num_errors} of Tune's trials failed: the figure would mean nothing")
    finally:
        results = None
        gc.collect()  # actor handles must not outlive the connection
        ray.shutdown()
    show(name, trials, ended - began, ended - start)


def header() -> None:
    """Print what was measured, and on what."""
    found = versions()
    machine = f"{found.pop('platform')}, {found.pop('cores')} cores"
    print("# Overhead of the driver per trial\n")
    print("Trials looked up in a price table of 18 layers: all of the time is overhead. `python -m "
          "benchmarks.driver_overhead` says in its first lines what each row holds.\n")  # fmt: skip
    print(f"Machine: {machine}. Versions: {', '.join(f'{k} {v}' for k, v in found.items())}.\n")
    print("| | trials | ms per trial | total, s |\n|---|---:|---:|---:|", flush=True)


def main() -> None:
    """Print the table."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    table = price_table(LAYERS)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would write one into the home directory
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's own tables
    header()
    measure_tune("Ray Tune as it comes, empty trials", max(4, trials // 10), reuse_actors=False)
    measure_tune("Ray Tune with reuse_actors, empty trials", max(4, trials // 4), reuse_actors=True)
    for batch in (4, 64):
        measure(f"engine alone, batches of {batch}", table, partial(alone, table, trials, batch))
    measure("with proposals and study", table, lambda folder: recorded(table, trials, folder, tracked=False))
    measure("with proposals, study and MLflow", table, lambda folder: recorded(table, trials, folder, tracked=True))


if __name__ == "__main__":
    main()
