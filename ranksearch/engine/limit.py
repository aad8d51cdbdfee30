"""A time limit of one trial: its computation is interrupted, or where that is deaf to it, its process ended."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

GRACE_S = 10.0
"""How long after the limit a process that cannot be interrupted is ended."""


class Overdue(BaseException):
    """A computation took longer than it may; no ``except Exception`` on its way holds it up."""


@contextmanager
def limited(seconds: float | None, *, deadly: Path | None = None) -> Iterator[None]:
    """Raise :class:`Overdue` in the block after so many seconds; None never does.

    Python code is interrupted between two steps, a wait or a sleep at once. Other threads than the main one cannot be.

    Args:
        seconds: the limit.
        deadly: the process is ended where it has not left the block ``GRACE_S`` after the limit, as where one call
            into a library never returns; just before, it leaves its last steps in this file, which is empty till then.
    """
    if seconds is None:
        yield
        return
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _raise) if here else None
    timer, began = signal.getitimer(signal.ITIMER_REAL), time.monotonic()
    with nullcontext() if deadly is None else deadly.open("w") as mark:
        try:
            if mark is not None:
                faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=mark)
            try:
                if here:
                    signal.setitimer(signal.ITIMER_REAL, seconds)
                yield
            finally:  # of its own: the signal may come right here
                if here:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            if mark is not None:
                faulthandler.cancel_dump_traceback_later()
            if here:
                signal.signal(signal.SIGALRM, before)
            if here and timer[0]:  # somebody else's, that was running before
                left = max(1e-3, timer[0] - (time.monotonic() - began))
                signal.setitimer(signal.ITIMER_REAL, left, timer[1])


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Overdue
