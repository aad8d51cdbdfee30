"""Work on several processes at once that are one process group of PyTorch: Ray Train starts them, and anew if one dies.

Ray Train runs in a task beside the driver, and an actor there holds what the workers tell: the driver only listens, so
that Ctrl-C ends it at once, and no checkpoint needs a folder that all machines share.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranksearch.engine import brief, reason
from ranksearch.engine.cluster import cluster, nodes, quiet
from ranksearch.engine.resources import check_team
from ranksearch.errors import EngineError, RanksearchError
from ranksearch.secrecy import adopt
from ranksearch.space import ResourcesSpec

_RESTARTS = 3
"""How often workers are started anew where one dies."""
_LISTENING_SECONDS = 1.0
"""How long the driver waits for a word before it looks whether the work has ended."""
_THREADS = 64
"""Calls that the actor beside the driver answers at once."""
_PARTING_SECONDS = 60.0
"""How long the workers are given to end, and one whose foreman has died to be ended, before it fails."""
_ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray Train leaves the working directory alone, and looks twice a second whether its workers are alive."""

Work = Callable[[Any], None]
"""Called with a :class:`Member` in every process; pickled to them once."""
Hear = Callable[[Any], None]
"""Called in the driver with what the workers tell and keep."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the processes, as it is seen from within."""

    place: int
    """From 0."""
    size: int
    """Of them all."""
    device: torch.device
    kept: bytes | None
    """What was kept last, before a process died and all were started anew."""
    foreman: Any
    """Handle of the actor beside the driver."""

    def tell(self, message: Any) -> None:
        """Let the driver hear a message, sometime."""
        self.foreman.tell.remote(message)

    def keep(self, content: bytes) -> None:
        """Let the driver hear it, and those that may be started anew find it; returns when it is safe."""
        _answer(self.foreman.keep.remote(content))


@contextmanager
def crew(spec: ResourcesSpec) -> Iterator[Callable[[Work, Hear], None]]:
    """``spec.workers`` processes, each with the CPUs and GPUs of a trial, on a Ray that is there as long as the block.

    What it gives runs work on all of them and returns when all have ended. An error of ranksearch, or of arithmetic,
    is raised as it is.

    Raises:
        EngineError: they do not fit the machines, or one after the other died.
    """
    check_team(spec)
    # Started with the CPUs that there are: several workers on one would only be slower.
    with quiet(spec.address), cluster(spec.model_copy(update={"workers": None})):
        check_team(spec, nodes())
        yield partial(_run, spec)


def _run(spec: ResourcesSpec, work: Work, hear: Hear) -> None:
    """Run work, and hear what is told of it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor, task = ray.remote(num_cpus=0)(_Foreman), ray.remote(num_cpus=0, max_retries=0)(_fit)
    foreman: Any = actor.options(scheduling_strategy=here, max_concurrency=_THREADS).remote()
    running = task.options(scheduling_strategy=here).remote(foreman, [ray.put(work)], spec)
    try:
        over = False
        while not over:
            over = bool(ray.wait([running], timeout=0)[0])
            for message in ray.get(foreman.heard.remote(0.0 if over else _LISTENING_SECONDS)):
                if isinstance(message, Exception):
                    raise message
                hear(message)
        failure = ray.get(running)
    except RayError as error:
        failure = reason(error)
    finally:
        # As Ctrl-C would reach it: Ray Train ends its workers and gives back what it has reserved. The foreman goes
        # last, and no handle of it outlives the connection, which would end the process.
        ray.cancel(running, recursive=False)
        ray.wait([running], timeout=_PARTING_SECONDS)
        ray.kill(foreman)
        del foreman, running
    if failure is not None:
        raise EngineError(
            f"the workers were started {1 + _RESTARTS} times and failed: {failure}. Where memory is short, take fewer "
            "with --workers; the same command goes on from the last epoch."
        )


def _fit(foreman: Any, held: list[Any], spec: ResourcesSpec) -> str | None:
    """Run the work that ``held`` refers to by Ray Train; returns why it failed."""
    import ray.train
    from ray.train.torch import TorchTrainer

    os.environ.update(_ENVIRONMENT)
    gpus = spec.gpus_per_trial
    with tempfile.TemporaryDirectory(prefix="ranksearch-train-") as folder:
        trainer = TorchTrainer(
            partial(_work, held, foreman, on_gpu=gpus > 0),
            scaling_config=ray.train.ScalingConfig(
                num_workers=spec.workers or 1,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": spec.cpus_per_trial, "GPU": gpus},
            ),
            run_config=ray.train.RunConfig(
                name="training",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=_RESTARTS),
            ),
        )
        try:
            with suppress(SystemExit):  # how Ray Train ends where it is interrupted
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            failures = [*getattr(error, "worker_failures", {}).values(), error]
            told = str(failures[0]).strip() or type(failures[0]).__name__
            return brief(told.splitlines()[-1])
    return None


class _Foreman:
    """Holds what the workers tell, until the driver hears it."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._kept: bytes | None = None

    def tell(self, message: Any) -> None:
        """Take a message for the driver."""
        self._told.put(message)

    def keep(self, content: bytes) -> None:
        """Take what the driver is to hear, and workers that start later are to find."""
        self._kept = content
        self._told.put(content)

    def kept(self) -> bytes | None:
        """What was kept last."""
        return self._kept

    def heard(self, seconds: float) -> list[Any]:
        """What was told since; waits so long for a first word."""
        found: list[Any] = []
        try:
            found.append(self._told.get(timeout=seconds) if seconds else self._told.get_nowait())
            while True:
                found.append(self._told.get_nowait())
        except queue.Empty:
            return found


def _work(held: list[Any], foreman: Any, *, on_gpu: bool) -> None:
    """What every worker does."""
    import ray.train
    import ray.train.torch

    adopt()
    context = ray.train.get_context()
    member = Member(
        place=context.get_world_rank(),
        size=context.get_world_size(),
        device=ray.train.torch.get_device() if on_gpu else torch.device("cpu"),
        kept=_answer(foreman.kept.remote()),
        foreman=foreman,
    )
    try:
        ray.get(held[0])(member)
    except (RanksearchError, ArithmeticError) as error:
        # It would come again: nothing is gained by starting anew.
        _answer(foreman.tell.remote(error))


def _answer(reference: Any) -> Any:
    """What the foreman answers.

    Where it has died, all are about to be ended with it. A worker that failed until then would have Ray Train begin
    anew, and what it reserves while it is being ended itself, a cluster holds for ever.
    """
    try:
        return ray.get(reference)
    except RayActorError:
        time.sleep(_PARTING_SECONDS)
        raise
