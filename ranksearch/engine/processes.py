"""The processes of a Ray that this process starts.

Ray gives one second to its raylet, then kills it, and waits for none of the agents and workers that the raylet started:
on a busy machine they outlive the search. A start that took too long leaves all of them running.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import ray

_PAUSE_SECONDS = 0.05
_KILLED_SECONDS = 10.0
"""How long a process that is killed may take: one that waits for a disk does not hear it."""


class Started:
    """The processes of the Ray that this process starts from now on."""

    def __init__(self) -> None:
        self._others = set(_children())

    def family(self) -> list[psutil.Process]:
        """Those that run now, with all that they started."""
        own = [child for child in _children() if child not in self._others]
        return own + [descendant for child in own for descendant in _descendants(child)]


def end(processes: Iterable[psutil.Process], *, seconds: float = 0.0) -> None:
    """Wait until processes have ended, and kill those that take longer."""
    slow = _wait(processes, seconds)
    for process in slow:
        with suppress(psutil.Error):
            process.kill()
    _wait(slow, _KILLED_SECONDS)


def _wait(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if _runs(one)]) and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
    return left


def _children() -> list[psutil.Process]:
    """This process's children that are Ray's, which have a file of its package on their command line."""
    package = str(Path(ray.__file__).parent)
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(word.startswith(package) for word in child.cmdline()):
                found.append(child)
    return found


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    return []


def _runs(process: psutil.Process) -> bool:
    """Whether a process runs still; one that nobody has asked for its status yet does not."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
