"""A parallel ``map`` over processes of this machine, which hold the function warm.

Each process is sent the function once, however large, then one item after the other. It is a fresh interpreter that
imports what the function needs: a fork would inherit PyTorch's locks, and a process that ``multiprocessing`` spawns
runs the user's script again, the whole search with it where the script guards nothing. It is deaf to Ctrl-C, which
reaches it through the process that started it, and ends with that one, however that one ends.
"""

from __future__ import annotations

import builtins
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from ranksearch.engine import reason
from ranksearch.errors import EngineError

Work = Callable[[Any], Any]
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from ranksearch.engine.pool import serve
serve(connection)
"""
_PATIENCE_SECONDS = 10.0
"""How long a process may take to put its files in order when it is told to end."""


def over_processes(count: int) -> Callable[[Work, Iterable[Any]], Iterator[Any]]:
    """A ``map`` over up to ``count`` processes; results come in the order of the items.

    An error of the function is raised here as it is. A function that cannot be pickled, or holds what the user's script
    itself defines, as a user's network may, is called in this process; so it is where there is work for one only.

    Raises:
        EngineError: a process died.
    """

    def run(work: Work, items: Iterable[Any]) -> Iterator[Any]:
        left = list(items)
        content = _pickled(work) if min(count, len(left)) > 1 else None
        if content is None:
            yield from builtins.map(work, left)
        else:
            yield from _dealt(content, left, min(count, len(left)))

    return run


def _pickled(work: Work) -> bytes | None:
    """The function as bytes, or None where another process could not read it."""
    try:
        content = pickle.dumps(work)
    except Exception:  # whatever a user's classes raise
        return None
    return None if b"__main__" in content else content


def _dealt(content: bytes, items: list[Any], count: int) -> Iterator[Any]:
    """The results in order; processes get an item whenever they have none."""
    todo = iter(enumerate(items))
    found: dict[int, Any] = {}
    given = 0
    with ExitStack() as stack:
        # All are started before any is sent something, so that they start side by side.
        idle = [stack.enter_context(_Process()) for _ in range(count)]
        for process in idle:
            process.send_work(content)
        busy: dict[Connection, tuple[_Process, int]] = {}
        while True:
            for process, (index, item) in zip(idle, todo, strict=False):
                process.send(item)
                busy[process.connection] = (process, index)
            idle = []
            while given in found:
                yield found.pop(given)
                given += 1
            if not busy:
                return
            for connection in wait(list(busy)):
                process, index = busy.pop(cast(Connection, connection))
                found[index] = process.receive()
                idle.append(process)


class _Process:
    """One process and the connection to it; ended when the block is left."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send_work(self, content: bytes) -> None:
        """Send the function, pickled."""
        try:
            self.connection.send(sys.path)
            self.connection.send_bytes(content)
        except OSError as error:
            raise self._dead() from error

    def send(self, item: Any) -> None:
        """Send one item."""
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._dead() from error

    def receive(self) -> Any:
        """The result of the item sent last; raises its error."""
        try:
            content = self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._dead() from error
        done, value = pickle.loads(content)
        if not done:
            raise value
        return value

    def _dead(self) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_SECONDS)
        status = self._process.poll()
        cause = f"status {status}" if status is None or status >= 0 else signal.Signals(-status).name
        return EngineError(
            f"a process of {os.path.basename(sys.executable)} that measures prices died ({cause}). "
            "Where memory is short, lower resources.workers or strategy.price_images."
        )


def serve(connection: Connection) -> None:
    """Answer items until the connection ends; runs in a process of the pool."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves blocks in order: no half-written file stays
    try:
        work = _unpickled(connection.recv_bytes())
        while True:
            connection.send_bytes(answer(work, connection.recv()))
    except (EOFError, OSError):
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # while Python shuts down, an exit would be an error


def _unpickled(content: bytes) -> Work:
    try:
        work: Work = pickle.loads(content)
        return work
    except Exception as error:
        missing = EngineError(f"a process cannot read what it is to do: {reason(error)}. Search with fewer workers: 1.")

        def failing(_: Any) -> Any:
            raise missing

        return failing


def answer(work: Work, item: Any) -> bytes:
    """Pickled: True and the result, or False and the error."""
    try:
        return pickle.dumps((True, work(item)))
    except Exception as error:
        with suppress(Exception):
            content = pickle.dumps((False, error))
            pickle.loads(content)  # an error may be written, and yet not be read
            return content
        return pickle.dumps((False, EngineError(reason(error))))
