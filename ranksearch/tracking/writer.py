"""A background thread that does jobs in order and keeps those that fail; it knows nothing of what they write."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from queue import Queue
from threading import Thread

Job = Callable[[bool], None]
"""Does one piece of writing; the argument says whether it was tried before, and so may be half done."""

_REST_S = 30.0
"""How long a store that failed is left alone, so that a dead server does not hold up the queue."""

_logger = logging.getLogger("ranksearch")


class Writer:
    """Jobs handed over are done by one thread, in order; nothing that a job raises reaches the caller.

    A job that fails is tried again after each of ``pauses_s``, then kept until another one succeeds, or ``flush``; the
    failure is logged once. The caller waits only where ``capacity`` jobs are waiting, never for a store that is away:
    as many failed jobs are kept at most, and further ones left out. A job that raises an error that ``rejected``
    recognises can never succeed: it is logged and dropped.
    """

    def __init__(
        self,
        what: str,
        *,
        capacity: int = 1000,
        pauses_s: Sequence[float] = (0.5, 2.0),
        rejected: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self._what = what
        self._pauses_s = tuple(pauses_s)
        self._rejected = rejected
        self._jobs: Queue[Job | None] = Queue(maxsize=capacity)
        self._capacity = capacity
        self._kept: list[Job] = []
        self._left_out = 0
        """How many jobs failed when as many as there is room for were kept already."""
        self._down_until = 0.0
        self._warned = False
        self._dropped = False
        self._thread = Thread(target=self._run, name=f"{what} writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a job over and return at once, or as soon as fewer than ``capacity`` are waiting."""
        self._jobs.put(job)

    def flush(self) -> int:
        """Wait for the queue, try once more what failed, and return how many jobs are not done, left out or kept."""
        self._jobs.join()
        self._down_until = 0.0
        self._do_kept()
        return len(self._kept) + self._left_out

    def now(self, job: Job) -> bool:
        """Do a job on the caller's thread, after the queue; whether it succeeded. It is not kept if it fails."""
        self._jobs.join()
        return self._attempt(job, again=False)

    def drop(self) -> None:
        """Leave undone what is waiting, and all that is still handed over; a job that is at work is the last."""
        self._dropped = True

    def close(self) -> None:
        """Finish the queue and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._do(job, again=False) and self._kept:
                self._do_kept()  # the store is back
            self._jobs.task_done()
        self._jobs.task_done()

    def _do(self, job: Job, *, again: bool) -> bool:
        done = self._attempt(job, again=again)
        if not done and len(self._kept) < self._capacity:
            self._kept.append(job)
        elif not done:
            self._left_out += 1
        return done

    def _do_kept(self) -> None:
        """Try once more what failed."""
        waiting, self._kept = self._kept, []
        for job in waiting:
            self._do(job, again=True)

    def _attempt(self, job: Job, *, again: bool) -> bool:
        """Try a job until it succeeds or the pauses are used up; then leave the store alone for a while."""
        if time.monotonic() < self._down_until:
            return False
        for pause_s in (*self._pauses_s, None):
            if self._dropped:
                return False
            try:
                job(again)
                return True
            except Exception as error:  # whatever a store, its driver or the disk raises: the search goes on
                if self._rejected(error):
                    self._warn(f"{self._what} refused a record, which is left out: {error}")
                    return True
                again = True
                if pause_s is None:
                    self._warn(
                        f"{self._what} cannot be written: {error}. The search goes on; what is missing is tried again "
                        "at its end, and whenever it is resumed."
                    )
                else:
                    time.sleep(pause_s)
        self._down_until = time.monotonic() + _REST_S
        return False

    def _warn(self, message: str) -> None:
        if not self._warned:
            _logger.warning(message)
            self._warned = True
