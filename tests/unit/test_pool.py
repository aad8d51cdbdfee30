"""The map over processes: results in order, the function sent once, errors as they are, and nothing left behind."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ranksearch.engine import build_map
from ranksearch.engine.pool import over_processes
from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec
from tests.conftest import REPOSITORY


class _OwnError(Exception):
    """Cannot be read again: its two arguments are not what it hands to its base."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass
class Work:
    """Squares, with accidents; leaves a file for every process that reads it and for every call."""

    folder: Path
    calls: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    meet: int = 0
    """Nobody begins until so many processes have read the function."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        (self.folder / f"read-{os.getpid()}-{time.monotonic_ns()}").touch()
        atexit.register(time.sleep, 0.5)  # the shutdown of a process that has imported much takes as long

    def __call__(self, item: int) -> tuple[int, int, int]:
        self.calls += 1
        while len(read_by(self.folder)) < self.meet:
            time.sleep(0.05)
        time.sleep(self.seconds.get(item, 0.0))
        if item == -1:
            raise ValueError("a kernel holds NaN")
        if item == -2:
            raise _OwnError("one", "two")
        if item == -3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item, self.calls, os.getpid()


def read_by(folder: Path) -> list[int]:
    """The processes that read the function."""
    return [int(path.name.split("-")[1]) for path in folder.glob("read-*")]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_results_come_in_order_and_the_function_is_read_once_a_process(tmp_path: Path) -> None:
    found = list(over_processes(2)(Work(tmp_path, seconds={0: 2.0}, meet=2), range(9)))
    assert [square for square, _, _ in found] == [i * i for i in range(9)]
    processes = {pid for _, _, pid in found}
    assert sorted(read_by(tmp_path)) == sorted(processes)
    assert len(processes) == 2
    assert os.getpid() not in processes
    for pid in processes:
        mine = [calls for _, calls, other in found if other == pid]
        assert mine == list(range(1, len(mine) + 1)), "the function lives on from item to item"
        assert not alive(pid)
    slow = found[0][2]
    assert sum(pid == slow for _, _, pid in found) < 9 / 2, "whoever is done takes the next item"


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        (-1, ValueError, "^a kernel holds NaN$"),
        (-2, EngineError, "_OwnError: one and two"),
        (-3, EngineError, r"died \(SIGKILL\).*Where memory is short, lower"),
    ],
)
def test_an_error_is_raised_here_and_ends_the_others(
    item: int, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        list(over_processes(2)(Work(tmp_path, seconds={1: 600.0}, meet=2), [0, 1, item, 3]))
    assert time.monotonic() - started < 60
    assert len(read_by(tmp_path)) == 2
    assert not any(map(alive, read_by(tmp_path)))


def test_who_stops_listening_ends_the_processes(tmp_path: Path) -> None:
    results = over_processes(2)(Work(tmp_path, seconds={2: 600.0, 3: 600.0}, meet=2), range(9))
    assert next(results)[0] == 0
    results.close()  # type: ignore[attr-defined]
    assert not any(map(alive, read_by(tmp_path)))


def test_what_cannot_be_pickled_or_is_little_is_done_here(tmp_path: Path) -> None:
    def work(item: int) -> tuple[int, int]:
        return item, os.getpid()

    assert list(over_processes(2)(work, [1, 2])) == [(1, os.getpid()), (2, os.getpid())]
    assert [pid for _, _, pid in over_processes(2)(Work(tmp_path), [5])] == [os.getpid()]
    assert [pid for _, _, pid in over_processes(1)(Work(tmp_path), [5, 6])] == [os.getpid()] * 2
    assert not read_by(tmp_path)


def test_what_the_users_script_defines_is_done_there(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os\nfrom ranksearch.engine.pool import over_processes\n"
        "def work(item):\n    return item, os.getpid()\n"
        "assert list(over_processes(2)(work, [1, 2])) == [(1, os.getpid()), (2, os.getpid())]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, check=True, timeout=60)


def test_a_function_that_cannot_be_read_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passing.py").write_text("def work(item):\n    return item\n")
    monkeypatch.syspath_prepend(tmp_path)
    import passing  # type: ignore[import-not-found]

    work: Callable[[Any], Any] = passing.work
    (tmp_path / "passing.py").write_text("raise ImportError('gone')\n")
    with pytest.raises(EngineError, match=r"cannot read what it is to do: ImportError: gone"):
        list(over_processes(2)(work, [1, 2]))


@pytest.mark.parametrize(("settings", "count"), [({"workers": 3}, 3), ({"cpus_per_trial": 1}, os.cpu_count())])
def test_as_many_processes_as_asked_for_or_as_there_are_cores(
    settings: dict[str, int], count: int, tmp_path: Path
) -> None:
    work = Work(tmp_path, meet=count)
    found = list(build_map(ResourcesSpec.model_validate(settings))(work, range(count)))
    assert len({pid for _, _, pid in found}) == count


PROGRAM = """
import sys
from pathlib import Path
Path(f"program-{len(list(Path().glob('program-*')))}").touch()
from ranksearch.engine.pool import over_processes
from tests.unit.test_pool import Work
try:
    print(sum(square for square, _, _ in over_processes(2)(Work(Path.cwd(), seconds={0: SECONDS}), range(4))))
except KeyboardInterrupt:
    sys.exit(130)
"""


def program(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A user's script that guards nothing, as a process group of its own."""
    (folder / "program.py").write_text(PROGRAM.replace("SECONDS", str(seconds)))
    return subprocess.Popen(
        [sys.executable, "-W", "error", "program.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    process = program(tmp_path, 0.0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "14\n", "")
    assert len(list(tmp_path.glob("program-*"))) == 1


@pytest.mark.parametrize("deadly", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_kill_end_the_processes(deadly: signal.Signals, tmp_path: Path) -> None:
    seconds = 600.0 if deadly == signal.SIGINT else 3.0  # orphans end with their item
    process = program(tmp_path, seconds)
    deadline = time.monotonic() + 60
    while len(read_by(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, deadly)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130 if deadly == signal.SIGINT else -signal.SIGKILL, "", "")
    while any(map(alive, read_by(tmp_path))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
