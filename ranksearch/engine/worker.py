"""What runs on the machines of a cluster: workers, and the mailbox through which tasks reach them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ranksearch.engine import Evaluate, Factory, attempt, memory, reason
from ranksearch.secrecy import adopt
from ranksearch.trial import Failure, Outcome, Task

_REPORT_SECONDS = 0.5
"""How long a finished task may wait to be reported together with the next."""
_IDLE_SECONDS = 5.0
"""How often a worker without tasks shows that it is alive."""

_Letter = tuple[list[Task], bool]
"""Tasks, and whether no other worker works where they are worked on."""


class Mailbox:
    """An actor through which tasks reach the workers: Tune itself hands a worker nothing once it runs."""

    def __init__(self) -> None:
        self._boxes: defaultdict[str, asyncio.Queue[_Letter | None]] = defaultdict(asyncio.Queue)

    async def put(self, worker: str, tasks: list[Task] | None, alone: bool = False) -> None:
        """Hand tasks to a worker, to be worked on ``alone`` or beside others, or None to end it."""
        self._boxes[worker].put_nowait(None if tasks is None else (tasks, alone))

    async def take(self, worker: str) -> _Letter | None:
        """The next tasks of a worker; none after a while."""
        try:
            return await asyncio.wait_for(self._boxes[worker].get(), _IDLE_SECONDS)
        except TimeoutError:
            return [], False


class Worker(tune.Trainable):
    """One worker: network, data and factors stay warm as long as it lives."""

    def setup(
        self,
        config: dict[str, Any],
        factory: Factory | None = None,
        mailbox: Any = None,
        limit_s: float | None = None,
    ) -> None:
        """Make the evaluator; where that fails, the first step tells. Tune fills in what ``with_parameters`` gave."""
        self._name: str = config["worker"]
        self._mailbox = mailbox
        self._limit_s = limit_s
        self._mark = Path(self.logdir, "overran")  # in Ray's own folder on this machine
        """File that tells that this worker ended itself, since its task did not heed the time limit."""
        self._share: float = config["gpu_share"]
        self._queue: list[Task] = []
        self._alone = False
        self._ready = False
        self._broken: str | None = None
        self._evaluate: Evaluate | None = None
        adopt()
        os.environ.update(config["variables"])
        try:
            memory.limit(self._share)
            self._evaluate = factory() if factory else None
        except Exception as error:
            self._broken = reason(error)

    def step(self) -> dict[str, Any]:
        """Evaluate tasks for a moment and report them."""
        if self._evaluate is None:
            return {"results": [], "broken": self._broken, "done": True}
        if not self._ready:
            self._ready = True
            return {"results": [], "place": memory.place(), "mark": str(self._mark), "done": False}
        if not self._queue:
            memory.release(self._share)
            letter: _Letter | None = ray.get(self._mailbox.take.remote(self._name))
            if letter is None:
                return {"results": [], "done": True}
            self._queue, self._alone = letter
        start = time.monotonic()
        results: list[tuple[int, Outcome | Failure]] = []
        while self._queue and time.monotonic() - start < _REPORT_SECONDS:
            task = self._queue.pop(0)
            with memory.whole(self._share) if self._alone else nullcontext():
                results.append((task.number, attempt(self._evaluate, task, limit_s=self._limit_s, deadly=self._mark)))
        return {"results": results, "seconds": time.monotonic() - start, "done": False}


def is_marked(name: str) -> bool:
    """Whether a worker of this machine that is gone left its mark."""
    mark = Path(name)
    return mark.exists() and mark.stat().st_size > 0
