"""Formats with and without stabilisation on ResNet-20, at equal MACs; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.stable_formats [--steps 78]``, the
folder as ``search_spaces/resnet20-cifar10.yaml`` describes it. All eighteen inner 3x3 convolutions take one format,
each at the most accurate ranks within the same share of its MACs, the largest share that keeps the network within the
target. Every network then gets the same brief fine-tuning. Sequential regression is off, so that only the factors
differ. A run diverges if its loss is not finite, or if it ends with less accuracy than it began with. Accuracies are
those of the 2,500 report images, mean and half the range over the seeds, which draw the batches of fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import dearest, machine, prepared
from ranksearch.evaluation import Bench, Evaluator
from ranksearch.factors import threads
from ranksearch.strategies.uniform import Uniform
from ranksearch.trial import Task

SPACE = "resnet20-cifar10.yaml"
TARGETS = (0.5, 0.35)
SEEDS = (0, 1, 2)
METHODS = {
    "tucker2": ("tucker2", "none"),
    "cp, plain ALS": ("cp", "none"),
    "cp, EPC": ("cp", "epc"),
    "tensor-chain, plain ALS": ("tensor-chain", "none"),
    "tensor-chain, stabilised": ("tensor-chain", "epc"),
    "tkd-cp, plain ALS": ("tkd-cp", "none"),
    "tkd-cp, EPC": ("tkd-cp", "epc"),
}
"""Name of a row to the format and the method of ``stabilise``."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One network to build and train."""

    method: str
    target: float
    learning_rate: float
    seed: int


@cache
def bench_of(form: str, stabiliser: str, learning_rate: float, steps: int, storage: str) -> Bench:
    """What evaluates the networks of one row."""
    settings = [
        f"formats=[{form}]",
        f"stabilise.method={stabiliser}",
        "evaluation.refit=false",
        "evaluation.factors=activation-aware",
        f"evaluation.fine_tune.steps={steps}",
        "evaluation.fine_tune.optimiser=sgd",
        "evaluation.fine_tune.batch_norm=batch",
        f"evaluation.fine_tune.learning_rate={learning_rate}",
        "resources.engine=local",
    ]
    return prepared(SPACE, settings, Path(storage), Path(tempfile.mkdtemp(dir=storage)))[1]


def run(job: Job, steps: int, storage: str) -> dict[str, Any]:
    """Accuracy before and after training, and what the factors were like."""
    form, stabiliser = METHODS[job.method]
    found: dict[str, Any] = {"method": job.method, "target": job.target, "learning_rate": job.learning_rate}
    found |= {"seed": job.seed}
    with threads(1):
        bench = bench_of(form, stabiliser, job.learning_rate, steps, storage)
        table = bench.table
        task = Task(number=0, choices=dearest(table, Uniform().maps(table), job.target), seed=job.seed, keep=True)
        untrained = bench.space.evaluation.model_copy(
            update={"fine_tune": bench.space.evaluation.fine_tune.model_copy(update={"steps": 0})}
        )
        before = Evaluator(replace(bench, space=bench.space.model_copy(update={"evaluation": untrained})))(task)
        found |= {"macs_ratio": table.macs_ratio(task.choices), "before": before.accuracy, "details": before.details}
        try:
            after = Evaluator(bench)(task)
        except FloatingPointError as error:
            return found | {"diverged": str(error)}
    found["sensitivity"] = after.details.get("sensitivity", [])
    return found | {"after": after.accuracy, "seconds": after.seconds}


def rows(results: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table: one a method, target and learning rate."""
    yield "| format | MACs | learning rate | sensitivity of all layers | after training | before | after | diverged |"
    yield "|---|---|---|---|---|---|---|---|"
    for key in dict.fromkeys((r["target"], r["learning_rate"], r["method"]) for r in results):
        ours = [r for r in results if (r["target"], r["learning_rate"], r["method"]) == key]
        after, before = [r["after"] for r in ours if "after" in r], [r["before"] for r in ours]
        lost = sum("after" not in r or r["after"] < r["before"] for r in ours)
        seen = [r["sensitivity"] for r in ours if r.get("sensitivity")]
        ends = [f"{fmean(series[i][1] for series in seen):.3g}" if seen else "-" for i in (0, -1)]
        yield (
            f"| {key[2]} | {ours[0]['macs_ratio']:.3f} | {key[1]} | {ends[0]} | {ends[1]} "
            f"| {_spread(before)} | {_spread(after)} | {lost} of {len(ours)} |"
        )


def _spread(values: list[float]) -> str:
    return f"{100 * fmean(values):.2f} ± {50 * (max(values) - min(values)):.2f} %" if values else "-"


def main() -> None:
    """Train all networks, two at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=78, help="optimiser steps of 128 images")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03], help="learning rates")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON lines to keep; what is there is not run again")
    chosen = parser.parse_args()
    jobs = [
        Job(method=method, target=target, learning_rate=rate, seed=seed)
        for rate in chosen.rates
        for target in TARGETS
        for method in METHODS
        for seed in SEEDS
    ]
    path = chosen.results
    results = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    done = {(r["method"], r["target"], r["learning_rate"], r["seed"]) for r in results}
    jobs = [job for job in jobs if (job.method, job.target, job.learning_rate, job.seed) not in done]
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as storage,
        ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool,
    ):
        for result in pool.map(run, jobs, [chosen.steps] * len(jobs), [storage] * len(jobs)):
            results.append(result)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    results.sort(key=lambda r: (r["learning_rate"], -r["target"], list(METHODS).index(r["method"]), r["seed"]))
    print("\n".join(rows(results)))
    print(
        f"\n{chosen.steps} steps of 128 images, {len(SEEDS)} seeds; {(time.perf_counter() - started) / 60:.1f} minutes."
    )
    print(machine())


if __name__ == "__main__":
    main()
