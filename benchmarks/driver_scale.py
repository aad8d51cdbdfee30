"""What the driver costs per trial as a study grows to ten thousand trials: it must stay flat.

``python -m benchmarks.driver_scale [trials] [workers ...]`` from the root of the repository; it prints Markdown.
Trials are looked up in a table of 18 layers, by so many simulated workers in this process: each has one trial, and the
next to end is drawn at random. All of the time that is counted is the driver's own: asking the strategy, recording in
the study (a journal file), keeping the front; what of it is the processor's is told too, as the rest is waiting for the
disk, and for other programs where the machine is not alone. Around the thousandth and the last trial each strategy
makes a hundred proposals in turn; in between they are drawn at random, which is cheap, so that the study grows quickly.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ranksearch.driver import Driver
from ranksearch.preparation import versions
from ranksearch.space import StrategySpec
from ranksearch.storage import Store
from ranksearch.strategies import Strategy, Terms, build_strategy
from ranksearch.table import PriceTable
from ranksearch.trial import Proposal, Signal, Task, Trial
from tests.studies import setting_of, space_of
from tests.tables import measured_table, table_outcome

EARLY = 1000
WINDOW = 100
"""Proposals of one strategy in a row."""
STRATEGIES = {
    "uniform": StrategySpec(name="uniform"),
    "knapsack": StrategySpec(name="knapsack"),
    "lc": StrategySpec(name="lc"),
    "optuna, NSGA-II": StrategySpec(name="optuna", sampler="nsga2", seeds=[]),
    "optuna, TPE": StrategySpec(name="optuna", sampler="tpe", seeds=[]),
}


class InTurn:
    """The strategies in turn, each for ``WINDOW`` proposals from ``EARLY`` on and up to the last; else at random."""

    def __init__(self, trials: int) -> None:
        terms = Terms(seed=0, objectives=("accuracy", "macs"))
        self._others = build_strategy(StrategySpec(name="random"), terms)
        self._by_index: dict[int, tuple[str, Strategy]] = {}
        for start in (EARLY, trials - WINDOW * len(STRATEGIES)):
            for i, (name, spec) in enumerate(STRATEGIES.items()):
                one = name, build_strategy(spec, terms)
                self._by_index |= dict.fromkeys(range(start + i * WINDOW, start + (i + 1) * WINDOW), one)

    def name(self, index: int) -> str:
        return self._by_index[index][0] if index in self._by_index else ""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        _, strategy = self._by_index.get(len(trials), ("", self._others))
        found = strategy.propose(table, trials)
        return found if isinstance(found, Proposal) else self._others.propose(table, trials)


Spent = dict[tuple[str, bool], np.ndarray]
"""By strategy and whether it was late: median milliseconds a trial, by the clock and of the processor."""


def now() -> np.ndarray:
    """Seconds of the clock and of this process's processor."""
    return np.array((time.perf_counter(), time.process_time()))


def simulated(trials: int, workers: int, folder: Path) -> tuple[Spent, float, float]:
    """What was spent; peak memory and size of the study, MiB."""
    table, rng = measured_table(), np.random.default_rng(0)
    space = space_of(budget={"trials": trials}, deterministic=False)
    study = Store(folder).create("scale", setting_of(space, table))
    strategy = InTurn(trials)
    driver = Driver(study, strategy)
    running: list[Task] = []
    spent: dict[tuple[str, bool], list[np.ndarray]] = {}
    while True:
        began = now()
        taken = driver.take(1) if len(running) < workers else []
        seconds = now() - began
        if not isinstance(taken, Signal) and taken:
            running += taken
            spent.setdefault((strategy.name(taken[0].index), taken[0].index > 2 * EARLY), []).append(seconds)
        elif not running:
            break
        else:
            task = running.pop(int(rng.integers(len(running))))
            outcome = table_outcome(table, task.choices)
            began = now()
            driver.done(task, outcome)
            spent.setdefault(("recording", task.index > 2 * EARLY), []).append(now() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = (study.folder / "journal.log").stat().st_size / 2**20
    # The recording of the trials around the windows, not of all.
    spent["recording", False] = spent["recording", False][EARLY : EARLY + WINDOW * len(STRATEGIES)]
    spent["recording", True] = spent["recording", True][-WINDOW * len(STRATEGIES) :]
    return {key: 1000 * np.median(found, axis=0) for key, found in spent.items()}, peak, size


def main() -> None:
    """Print the table."""
    trials, *workers = [int(argument) for argument in sys.argv[1:]] or [10_000, 1, 4, 16, 64]
    found = versions()
    machine = f"{found.pop('platform')}, {found.pop('cores')} cores"
    print("# The driver as a study grows\n")
    print("`python -m benchmarks.driver_scale` says in its first lines what is measured. Medians of 100 proposals, "
          "each with the recording of its trial's begin; *recording* is that of its end.\n")  # fmt: skip
    print(f"Machine: {machine}. Versions: {', '.join(f'{k} {v}' for k, v in found.items())}.\n")
    print(
        f"| workers | | ms at trial {EARLY:,} (processor) | ms at trial {trials:,} (processor) | ratio (processor) |\n"
        "|---:|---|---:|---:|---:|",
        flush=True,
    )
    notes = []
    for count in workers or [64]:
        with tempfile.TemporaryDirectory() as folder:
            ms, peak, size = simulated(trials, count, Path(folder))
        for name in (*STRATEGIES, "recording"):
            (early, early_cpu), (late, late_cpu) = ms[name, False], ms[name, True]
            row = f"{early:.1f} ({early_cpu:.1f}) | {late:.1f} ({late_cpu:.1f})"
            print(f"| {count} | {name} | {row} | {late / early:.2f} ({late_cpu / early_cpu:.2f}) |", flush=True)
        notes.append(f"{count} workers: study {size:.0f} MiB, peak memory so far {peak:.0f} MiB")
    print(f"\nAfter {trials:,} trials: {'; '.join(notes)}.")


if __name__ == "__main__":
    main()
