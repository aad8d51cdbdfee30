"""The engine of one process: tasks one after the other, right here."""

from __future__ import annotations

from ranksearch.engine import Evaluate, Factory, Source, attempt
from ranksearch.trial import DONE, WAIT


class LocalEngine:
    """Evaluates in this process.

    Args:
        limit_s: how many seconds a task may take; heeded where the search runs in the main thread.
    """

    def __init__(self, *, limit_s: float | None = None) -> None:
        self._limit_s = limit_s

    def run(self, factory: Factory, source: Source) -> None:
        """Evaluate the tasks of ``source`` until it is DONE; see :class:`~ranksearch.engine.Engine`."""
        evaluate: Evaluate | None = None
        while (tasks := source.take(1)) is not DONE:
            if tasks is WAIT:
                raise RuntimeError("the source waits for a running task, and none is running")
            evaluate = evaluate or factory()
            for task in tasks:
                source.done(task, attempt(evaluate, task, limit_s=self._limit_s))
