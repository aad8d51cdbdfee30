"""Where trials run: shares of GPUs and CPUs, labels, memory counted, and a trial that outgrows its share tried alone.

GPUs are declared, as Ray allows: they place workers and set what these see, without hardware.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from ranksearch.engine import build_engine
from ranksearch.engine.resources import Node, workers
from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec
from ranksearch.trial import Failure, Outcome, Task
from tests.integration.test_engines import TABLE, Batches
from tests.services import NODE, free_port, ray_node
from tests.tables import table_outcome

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of two machines: a fast one with two declared GPUs, and a slow one without."""
    port = free_port()
    fast = ("--num-cpus=2", "--num-gpus=2", "--labels=kind=fast")
    with (
        ray_node(*NODE, "--head", f"--port={port}", "--include-dashboard=false", *fast),
        ray_node(*NODE, f"--address=127.0.0.1:{port}", "--num-cpus=2", "--labels=kind=slow"),
    ):
        yield f"127.0.0.1:{port}"


@dataclass(frozen=True, kw_only=True)
class Noting:
    """An evaluator that notes where it is; a task waits until as many workers have started, a minute at most."""

    folder: Path
    workers: int
    weights: np.ndarray = field(default_factory=lambda: np.ones(200_000))

    def __call__(self) -> Callable[[Task], Outcome]:
        assert not self.weights.flags.owndata, "one copy a machine, which all its workers read"
        place = f"{ray.get_runtime_context().get_node_id()}-{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}"
        (self.folder / f"{place}-{os.getpid()}").touch()
        return self._evaluate

    def _evaluate(self, task: Task) -> Outcome:
        patience = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < self.workers and time.monotonic() < patience:
            time.sleep(0.05)
        return table_outcome(TABLE, task.choices)


@pytest.mark.slow
def test_each_trial_sees_its_own_share_of_a_gpu_alone(tmp_path: Path, cluster: str) -> None:
    spec = ResourcesSpec(engine="ray", workers=4, gpus_per_trial=0.5, cpus_per_trial=0.5, address=cluster)
    source = Batches(12, 12)
    build_engine(spec).run(Noting(folder=tmp_path, workers=4), source)
    assert all(isinstance(result, Outcome) for result in source.results.values())
    seen = [path.name.split("-") for path in tmp_path.iterdir()]
    assert Counter(device for _, device, _ in seen) == {"0": 2, "1": 2}, "two trials a GPU, each seeing that one only"
    assert len({process for _, _, process in seen}) == 4


@pytest.mark.slow
def test_trials_run_where_the_labels_say(tmp_path: Path, cluster: str) -> None:
    spec = ResourcesSpec(engine="ray", workers=2, labels={"kind": "slow"}, address=cluster)
    engine, deadline = build_engine(spec), time.monotonic() + 120
    while True:
        try:
            engine.run(Noting(folder=tmp_path, workers=2), Batches(4, 4))
            break
        except EngineError as error:  # until the second machine is there
            if "Start machines with" not in str(error) or time.monotonic() > deadline:
                raise
    places = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert len(places) == 1
    with ray.init(address=cluster, log_to_driver=False):
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
    assert labels[places.pop()]["kind"] == "slow"
    none = spec.model_copy(update={"labels": {"kind": "huge"}})
    with pytest.raises(EngineError, match=r"labelled kind=huge.*none fits\. Start machines with `ray start"):
        build_engine(none).run(Noting(folder=tmp_path, workers=2), Batches(4, 4))


@dataclass(frozen=True, kw_only=True)
class Purse:
    """Tasks take memory from a common purse of 100; where it does not hold as much, they raise as PyTorch does.

    Nobody begins before two workers have started. Most take 40. Number 3 takes 80, so it fits alone only, and first
    waits for another to run beside it; number 5 takes 120, which never fits.
    """

    folder: Path

    def __call__(self) -> Callable[[Task], Outcome]:
        (self.folder / f"worker-{os.getpid()}").touch()
        return self._evaluate

    def _evaluate(self, task: Task) -> Outcome:
        while len(list(self.folder.glob("worker-*"))) < 2:
            time.sleep(0.05)
        need = {3: 80, 5: 120}.get(task.seed, 40)
        tried = self.folder / f"tried-{task.seed}"
        if task.seed == 3 and not tried.exists():
            tried.touch()
            patience = time.monotonic() + 60
            while not self._taken() and time.monotonic() < patience:
                time.sleep(0.01)
        taken = self.folder / f"taken-{need}-{os.getpid()}"
        if self._taken() + need > 100:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {need}")
        taken.touch()
        time.sleep(0.2)
        taken.unlink()
        return table_outcome(TABLE, task.choices)

    def _taken(self) -> int:
        return sum(int(path.name.split("-")[1]) for path in self.folder.glob("taken-*"))


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_is_tried_once_alone(tmp_path: Path, cluster: str) -> None:
    spec = ResourcesSpec(engine="ray", workers=2, labels={"kind": "fast"}, address=cluster)
    source = Batches(16, 16)
    build_engine(spec).run(Purse(folder=tmp_path), source)
    assert sorted(source.results) == list(range(16))
    failed = {number: result for number, result in source.results.items() if isinstance(result, Failure)}
    assert set(failed) == {5}, "what fits alone is recovered"
    assert failed[5].reason.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 120 (also alone")
    assert not failed[5].interrupted
    assert (tmp_path / "tried-3").exists()


def test_how_many_trials_fit_counts_memory_labels_and_shares() -> None:
    gib = 2**30
    fast, slow = Node(8, 2, 64 * gib, {"kind": "fast"}), Node(4, 0, 8 * gib, {"kind": "slow"})
    for spec, count in (
        ({}, 12),
        ({"cpus_per_trial": 0.5}, 24),
        ({"cpus_per_trial": 0.1}, 120),
        ({"memory_gb_per_trial": 4}, 8 + 2),
        ({"memory_gb_per_trial": 30}, 2),
        ({"labels": {"kind": "slow"}}, 4),
        ({"gpus_per_trial": 0.25}, 8),
        ({"gpus_per_trial": 0.3}, 6),
        ({"gpus_per_trial": 1.0}, 2),
    ):
        assert workers(ResourcesSpec(engine="ray", **spec), [fast, slow]) == count, spec
    with pytest.raises(EngineError, match=r"100 GB of memory, .* 64\.0 GB.*Lower resources\.memory_gb_per_trial"):
        workers(ResourcesSpec(engine="ray", memory_gb_per_trial=100), [fast, slow])
    assert ResourcesSpec(cpus_per_trial=0.5).threads == 1
    assert ResourcesSpec(cpus_per_trial=2.5).threads == 3
