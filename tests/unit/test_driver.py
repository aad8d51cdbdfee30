"""The driver between a real strategy, a real study and real engines; only the networks are looked up in a table."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranksearch.driver import STOPPED, Driver
from ranksearch.engine import Engine, build_engine
from ranksearch.space import ResourcesSpec, Space
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, WAIT, Failure, Outcome, Proposal, Signal, Task, Trial
from tests.studies import TABLE, Lookup, setting_of, space_of
from tests.tables import table_outcome

STRATEGIES: dict[str, dict[str, Any]] = {
    "nsga2": {"sampler": "nsga2", "seed_points": 2, "options": {"population_size": 4}},
    "tpe": {"sampler": "tpe", "seed_points": 3},
    "qmc": {"sampler": "qmc", "seeds": []},
    "random": {"name": "random"},
}


def space(trials: int = 22, strategy: str = "nsga2", *, deterministic: bool = True, **budget: float) -> Space:
    return space_of(
        budget={"trials": trials, **budget},
        strategy={"name": "optuna", "batch": 4, **STRATEGIES[strategy]},
        deterministic=deterministic,
        seed=3,
    )


def created(folder: Path, of: Space, name: str = "one") -> Study:
    return Store(folder).create(name, setting_of(of))


def driver_of(study: Study, watch: Callable[[Study, Trial], None] | None = None) -> Driver:
    of = study.space
    strategy = build_strategy(of.strategy, Terms(seed=of.seed, objectives=tuple(of.objectives)))
    return Driver(study, strategy, watch=watch)


def run(study: Study, engine: Engine | None = None, factory: Lookup | None = None) -> Study:
    """Drive a study to its end, as a search does."""
    driver = driver_of(study)
    (engine or build_engine(ResourcesSpec())).run(factory or Lookup(), driver)
    driver.stop()
    return study


def proposals(study: Study) -> list[tuple[Any, ...]]:
    """What a search found, whatever was interrupted on the way: one row a proposal."""
    done = {t.index: t for t in study.trials()}
    return [(i, done[i].proposal.choices, done[i].proposal.origin, done[i].state, done[i].values) for i in sorted(done)]


def taken(driver: Driver, limit: int = 1) -> list[Task]:
    tasks = driver.take(limit)
    assert not isinstance(tasks, Signal)
    return tasks


def test_every_proposal_is_tried_once(tmp_path: Path) -> None:
    trials = run(created(tmp_path, space())).trials()
    assert [t.number for t in trials] == [t.index for t in trials] == list(range(22))
    assert len({t.proposal.choices for t in trials}) == 22
    for trial in trials:
        assert trial.outcome == table_outcome(TABLE, trial.proposal.choices)


def test_tasks_come_in_batches_that_wait_for_each_other(tmp_path: Path) -> None:
    driver = driver_of(created(tmp_path, space(trials=6)))
    first = taken(driver, 3) + taken(driver, 3)
    assert [task.number for task in first] == [0, 1, 2, 3]
    assert driver.take(3) is WAIT
    for task in reversed(first):
        assert driver.take(3) is WAIT
        driver.done(task, table_outcome(TABLE, task.choices))
    second = taken(driver, 9)
    assert [task.number for task in second] == [4, 5], "the budget ends the second batch"
    assert driver.take(1) is WAIT
    for task in second:
        driver.done(task, table_outcome(TABLE, task.choices))
    assert driver.take(1) is DONE


def test_what_is_tried_again_is_held_against_the_same_front(tmp_path: Path) -> None:
    """The front says which trials are scored on the report images: that must not depend on what was interrupted."""
    study = created(tmp_path, space(trials=12))
    driver = driver_of(study)
    for task in taken(driver, 4):
        driver.done(task, table_outcome(TABLE, task.choices))
    batch = taken(driver, 4)
    assert len({task.incumbents for task in batch}) == 1
    assert batch[0].incumbents
    for task in batch[:2]:  # onto the front
        driver.done(task, replace(table_outcome(TABLE, task.choices), accuracy_search=0.99))
    driver.done(batch[2], Failure(reason="its worker died", interrupted=True))
    driver.stop()
    again = taken(driver_of(study), 4)
    assert [task.choices for task in again] == [task.choices for task in batch[2:]]
    assert {task.incumbents for task in again} == {batch[0].incumbents}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_results_does_not_matter(strategy: str, tmp_path: Path) -> None:
    found = []
    for order in ("as taken", "reversed"):
        study = created(tmp_path, space(strategy=strategy), order.replace(" ", "-"))
        driver = driver_of(study)
        while (tasks := driver.take(4)) is not DONE:
            assert not isinstance(tasks, Signal)
            for task in tasks if order == "as taken" else reversed(tasks):
                driver.done(task, table_outcome(TABLE, task.choices))
        found.append((proposals(study), [t.number for t in study.front_trials()]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_engines_and_workers_give_the_same_trials(tmp_path: Path) -> None:
    expected = run(created(tmp_path, space(trials=14), "local"))
    failing = {expected.trials()[5].proposal.choices: "NaN in a kernel"}
    expected = run(created(tmp_path, space(trials=14), "failing"), factory=Lookup(failing=failing))
    assert [t.number for t in expected.trials() if t.state == "FAIL"] == [5]
    for workers in (1, 2):
        study = created(tmp_path, space(trials=14), f"ray-{workers}")
        run(study, build_engine(ResourcesSpec(engine="ray", workers=workers)), Lookup(failing=failing))
        assert proposals(study) == proposals(expected)
        assert [t.number for t in study.trials()] == list(range(14))
        assert [t.reason for t in study.trials()] == [t.reason for t in expected.trials()]


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_asynchronous(limit: int, tmp_path: Path) -> None:
    study = created(tmp_path, space(deterministic=False))
    driver = driver_of(study)
    running: list[Task] = []
    for turn in itertools.count():
        tasks = driver.take(limit)
        if tasks is DONE:
            break
        if not isinstance(tasks, Signal):
            assert 1 <= len(tasks) <= limit
            running += tasks
        if tasks is WAIT or turn % 2:
            task = running.pop(turn % len(running))
            driver.done(task, table_outcome(TABLE, task.choices))
    assert not running
    assert sorted(t.index for t in study.trials()) == list(range(22))
    assert {t.state for t in study.trials()} == {"COMPLETE"}


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_interrupted_proposal_is_tried_once_more(deterministic: bool, tmp_path: Path) -> None:
    study = created(tmp_path, space(trials=8, deterministic=deterministic))
    driver = driver_of(study)
    tasks: dict[int, list[Task]] = {}
    while (batch := driver.take(4)) is not DONE:
        assert not isinstance(batch, Signal)
        for task in batch:
            trial = study.trials()[task.number]
            tasks.setdefault(trial.index, []).append(task)
            lost = trial.index == 2 or (trial.index == 5 and trial.attempt == 0)
            result = Failure(reason="killed", interrupted=True) if lost else table_outcome(TABLE, task.choices)
            driver.done(task, Failure(reason="NaN") if trial.index == 3 else result)
    assert {index: len(tries) for index, tries in tasks.items()} == {i: 2 if i in (2, 5) else 1 for i in range(8)}
    for index in (2, 5):
        first, second = tasks[index]
        assert (first.choices, first.seed) == (second.choices, second.seed)
        assert first.number != second.number
    assert len({tries[0].seed for tries in tasks.values()}) == 8
    states = {t.index: t.state for t in study.trials()}
    assert states == {i: "FAIL" if i in (2, 3) else "COMPLETE" for i in range(8)}
    assert len(study.trials()) == 10, "eight proposals and two retries"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interrupted_anywhere_it_goes_on_as_if_never_stopped(strategy: str, tmp_path: Path) -> None:
    of = space(trials=14, strategy=strategy)
    expected = proposals(run(created(tmp_path, of, "whole")))
    for begun, finished in [(0, 0), (1, 0), (4, 2), (6, 4), (8, 5), (11, 8), (12, 11), (14, 14)]:
        study = created(tmp_path, of, f"stopped-{begun}-{finished}")
        driver, tasks = driver_of(study), []
        while len(study.trials()) < begun:
            batch = taken(driver, 4)
            tasks += batch
            # The second half of a batch ends before the first, and what is left over never does.
            for task in [*batch[2:], *batch[:2]][: max(0, finished - len(tasks) + len(batch))]:
                driver.done(task, table_outcome(TABLE, task.choices))
        done = {t.number: t for t in study.trials() if t.state == "COMPLETE"}

        again = Store(tmp_path).open(study.name)
        again.recover()
        run(again)
        assert proposals(again) == expected
        assert {t.number: t for t in again.trials() if t.number in done} == done, "what is finished is left alone"
        assert not [t for t in again.trials() if t.state == "RUNNING"]
        assert len(again.trials()) == 14 + len([t for t in again.trials() if t.retry])


def test_killed_between_two_proposals_of_a_batch(tmp_path: Path) -> None:
    """A driver that dies after it recorded half of a batch: the batch is made complete before the next."""
    expected = run(created(tmp_path, space(trials=12), "whole"))
    study = created(tmp_path, space(trials=12), "half")
    for trial in expected.trials()[:6]:
        begun = study.begin(trial.proposal, index=trial.index)
        if trial.index < 4:
            study.finish(begun, table_outcome(TABLE, trial.proposal.choices))
    study.recover()
    assert proposals(run(study)) == proposals(expected)


def test_stopping_loses_no_proposal(tmp_path: Path) -> None:
    study = created(tmp_path, space(trials=6))
    for _ in range(3):
        driver = driver_of(study)
        task = taken(driver)[0]
        assert study.trials()[task.number].index == 0
        driver.stop()
    assert [(t.attempt, t.state) for t in study.trials() if t.index == 0] == [(i, "FAIL") for i in range(3)]
    assert {t.reason for t in study.trials()} == {STOPPED}
    assert proposals(run(study)) == proposals(run(created(tmp_path, space(trials=6), "whole")))


def test_a_proposal_is_lost_by_two_kills_only_if_it_ran_in_both(tmp_path: Path) -> None:
    """The first of a batch is with a worker when the driver is killed; the others wait for their turn."""
    study = created(tmp_path, space(trials=6))
    for _ in range(2):
        assert [task.index for task in taken(driver_of(study), 1)] == [0]
        study.recover()
    run(study)
    ends = {t.index: t.state for t in study.trials()}
    assert ends == {0: "FAIL"} | dict.fromkeys(range(1, 6), "COMPLETE")
    assert [t.retry for t in study.trials() if t.index == 0] == [True, False]

    # A kill that came before it ran leaves it both of its tries.
    other = created(tmp_path, space(trials=6), "other")
    taken(driver_of(other), 1)
    other.recover()
    taken(driver_of(other), 2)
    other.recover()
    run(other)
    assert [(t.attempt, t.state) for t in other.trials() if t.index == 1] == [
        (0, "FAIL"),
        (1, "FAIL"),
        (2, "COMPLETE"),
    ]


def test_a_short_batch_is_not_made_longer_by_an_interruption(tmp_path: Path) -> None:
    """A strategy that waits for running trials in the middle of a batch does so again after a kill."""

    class Waiting:
        """Random rank maps, two by two."""

        def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
            if sum(trial.state == "RUNNING" for trial in trials) == 2:
                return WAIT
            ended = sum(trial.state == "COMPLETE" for trial in trials)
            rng = np.random.default_rng([ended, len(trials)])
            choices = tuple(int(rng.integers(len(layer.candidates))) for layer in table.layers)
            return Proposal(choices=choices, origin="waiting")

    found = []
    for name in ("whole", "killed"):
        study = created(tmp_path, space(trials=7), name)
        driver = Driver(study, Waiting())
        if name == "killed":
            first, _ = taken(driver, 4)
            driver.done(first, table_outcome(TABLE, first.choices))
            study.recover()
            driver = Driver(study, Waiting())
        build_engine(ResourcesSpec()).run(Lookup(), driver)
        found.append(proposals(study))
    assert found[0] == found[1]


def test_extending_goes_on_with_new_proposals(tmp_path: Path) -> None:
    study = run(created(tmp_path, space(trials=8)))
    before = study.trials()
    study.extend(12)
    after = run(study).trials()
    assert after[:8] == before
    assert [t.index for t in after] == list(range(12))
    assert proposals(study) == proposals(run(created(tmp_path, space(trials=12), "longer")))
    study.extend(5)
    assert run(study).trials() == after, "a smaller number takes nothing away"


def test_minutes(tmp_path: Path) -> None:
    study = created(tmp_path, space(trials=5, minutes=1e-9))
    assert driver_of(study).take(1) is DONE
    assert study.trials() == []
    enough = created(tmp_path, space(trials=5, minutes=10.0), "enough")
    assert len(run(enough).trials()) == 5


def test_weights_of_dominated_trials_are_removed(tmp_path: Path) -> None:
    study = created(tmp_path, space(trials=30))

    class Saving(Lookup):
        def _evaluate(self, task: Task) -> Outcome:
            outcome = table_outcome(TABLE, task.choices)
            values = (-outcome.accuracy_search, float(outcome.macs))
            if any(all(a <= b for a, b in zip(point, values, strict=True)) for point in task.incumbents):
                return outcome
            name = f"trial-{task.number:05d}.safetensors"
            (study.weights_folder / name).write_bytes(b"weights")
            kept.append(name)
            return Outcome(**(outcome.to_json() | {"weights": name}))

    kept: list[str] = []
    (study.weights_folder / "trial-00999.safetensors").write_bytes(b"of a trial that was killed")
    run(study, factory=Saving())
    there = {path.name for path in study.weights_folder.iterdir()}
    front = study.front_trials()
    assert there == {t.outcome.weights for t in front if t.outcome}
    assert len(there) == len(front) < len(kept) < 30, "some were never saved, some were removed later"


def test_watching(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []
    study = created(tmp_path, space(trials=5))
    driver = driver_of(study, watch=lambda _, trial: seen.append((trial.number, trial.state)))
    build_engine(ResourcesSpec()).run(Lookup(), driver)
    assert seen == [(i, "COMPLETE") for i in range(5)]


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    study = created(tmp_path, space(trials=8))

    def interrupt(_: Study, trial: Trial) -> None:
        if trial.number == 5:
            os.kill(os.getpid(), 2)

    driver = driver_of(study, watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(ResourcesSpec()).run(Lookup(), driver)
    driver.stop()
    assert [t.state for t in study.trials()] == ["COMPLETE"] * 6 + ["FAIL"] * 2
    assert [t.reason for t in study.trials()[6:]] == [STOPPED] * 2
    assert proposals(run(study)) == proposals(run(created(tmp_path, space(trials=8), "whole")))
