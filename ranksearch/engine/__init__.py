"""Where trials run: an engine takes tasks from a source, evaluates them, and hands back what came of each at once.

To add an engine, write a class with ``run`` and name it in ``build_engine``. Which tasks there are, in which order and
how often one is tried is the source's business; an engine only promises that every task it takes is handed back once.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ranksearch.engine.limit import Overdue, limited
from ranksearch.secrecy import redacted
from ranksearch.space import ResourcesSpec
from ranksearch.trial import Failure, Outcome, Signal, Task

if TYPE_CHECKING:
    from ranksearch.engine.meter import Meter

_REASON_LENGTH = 500


class Evaluate(Protocol):
    """Scores one task; raises where it cannot."""

    def __call__(self, task: Task) -> Outcome:
        """The measurements of the task's network."""
        ...


Factory = Callable[[], Evaluate]
"""Makes an evaluator that holds network, data and factors. It is pickled to a worker once, and called once there."""


class Source(Protocol):
    """What an engine takes its tasks from."""

    def take(self, limit: int) -> list[Task] | Signal:
        """From one to ``limit`` tasks; WAIT: none until a running one ends; DONE: none any more."""
        ...

    def done(self, task: Task, result: Outcome | Failure) -> None:
        """Hear what came of a task."""
        ...


class Engine(Protocol):
    """Runs tasks."""

    def run(self, factory: Factory, source: Source) -> None:
        """Evaluate the tasks of ``source`` until it is DONE.

        Raises:
            EngineError: there are no workers to be had, or one after the other died before it had a result.
            KeyboardInterrupt: as soon as it comes; running work is stopped, and not handed back.
        """
        ...


def build_engine(spec: ResourcesSpec, meter: Meter | None = None) -> Engine:
    """The engine that ``spec`` names; on Ray ``meter`` measures it."""
    if spec.engine == "ray":
        from ranksearch.engine.ray import RayEngine  # seconds of imports, so only where it is asked for

        return RayEngine(spec, meter)
    from ranksearch.engine.local import LocalEngine

    return LocalEngine(limit_s=limit_s(spec))


def build_map(spec: ResourcesSpec) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]:
    """A ``map`` that works as trials would: on Ray workers, or on processes of this machine; a local GPU is not shared.

    The function is sent to every worker once, and is called there for one item after the other.
    """
    if spec.engine == "ray":
        from ranksearch.engine.actors import over_actors

        return over_actors(spec)
    from ranksearch.engine.pool import over_processes

    cpus = os.cpu_count() or 1
    fitting = max(1, int(cpus / spec.cpus_per_trial))
    return builtins.map if spec.gpus_per_trial else over_processes(spec.workers or fitting)


def limit_s(spec: ResourcesSpec) -> float | None:
    """How many seconds a trial may take."""
    return None if spec.trial_minutes is None else 60 * spec.trial_minutes


def overdue(limit_s: float) -> Failure:
    """Of a trial that took longer than it may: it would again, so it is not tried once more."""
    return Failure(reason=f"it took longer than resources.trial_minutes={limit_s / 60:g}")


def attempt(
    evaluate: Evaluate, task: Task, *, limit_s: float | None = None, deadly: Path | None = None
) -> Outcome | Failure:
    """What came of one task; an error of its computation, out of memory included, is a failure with its reason.

    An error of the system (a full disk, a file server that is away) says nothing about the task: it counts as an
    interruption.

    Args:
        evaluate: scores the task.
        task: what to score.
        limit_s: how long it may take.
        deadly: a task that cannot be interrupted then takes the process along, and this file tells of it.
    """
    try:
        with limited(limit_s, deadly=deadly):
            return evaluate(task)
    except Overdue:
        return overdue(limit_s or 0.0)
    except Exception as error:
        if is_out_of_memory(error):
            return Failure(reason=reason(error), exhausted=True)
        # safetensors tells of a full disk in an error of its own.
        interrupted = isinstance(error, OSError) or "No space left" in str(error)
        return Failure(reason=reason(error), interrupted=interrupted)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the machine or of a GPU; PyTorch tells of both in a ``RuntimeError``."""
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in told or "can't allocate memory" in told)
    )


def reason(error: Exception) -> str:
    """Type and message of an error in one line, without passwords."""
    return brief(f"{type(error).__name__}: {error}").removesuffix(":")


def brief(text: str) -> str:
    """A text in one line of bounded length, without passwords."""
    return " ".join(redacted(text).split())[:_REASON_LENGTH]
