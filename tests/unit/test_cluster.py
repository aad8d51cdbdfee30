"""What is left of a Ray that was started here: nothing, however slow its processes and whatever became of its start.

Ray itself is a stand-in that starts its processes as Ray does; ``test_engines`` has the real one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ranksearch.engine import cluster as module
from ranksearch.engine.cluster import cluster
from ranksearch.errors import EngineError
from ranksearch.space import ResourcesSpec

LOCAL = ResourcesSpec(engine="ray", workers=1)
RAYLET = """
import subprocess, sys, time
for _ in range(2):
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(agent.pid, flush=True)
time.sleep(600)
"""


class Stand:
    """Starts a raylet with two agents; ends the raylet alone, as Ray does where that takes longer than a second."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        """What becomes of one start after the other."""
        self._raylets: list[subprocess.Popen[str]] = []
        self.processes: list[psutil.Process] = []

    def init(self, **_: Any) -> None:
        command = [sys.executable, "-c", RAYLET, str(Path(ray.__file__).parent / "raylet")]
        raylet = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert raylet.stdout is not None
        self._raylets.append(raylet)
        agents = [psutil.Process(int(raylet.stdout.readline())) for _ in range(2)]
        raylet.stdout.close()
        self.processes += [psutil.Process(raylet.pid), *agents]
        if self._errors:
            raise self._errors.pop(0)

    def shutdown(self) -> None:
        self._raylets[-1].kill()
        self._raylets[-1].wait()

    @property
    def running(self) -> int:
        left = [one for one in self.processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        return len(left)

    def clear(self) -> None:
        for raylet in self._raylets:
            raylet.kill()
            raylet.wait()
        for process in self.processes:
            if process.is_running():
                process.kill()


@pytest.fixture
def stand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Stand(*getattr(request, "param", ()))
    monkeypatch.setattr(ray, "init", made.init)
    monkeypatch.setattr(ray, "shutdown", made.shutdown)
    monkeypatch.setattr(module, "_ENDING_SECONDS", 0.2)
    yield made
    made.clear()


LATE = Exception("The current node timed out during startup. This could happen because the raylet failed.")


def test_nothing_that_ray_started_outlives_it(stand: Stand) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with cluster(LOCAL):
        assert stand.running == 3
    assert stand.running == 0
    assert other.poll() is None, "a process of somebody else's"
    other.kill()
    other.wait()


@pytest.mark.parametrize("stand", [(LATE, LATE)], indirect=True)
def test_a_start_that_takes_too_long_is_tried_again(stand: Stand) -> None:
    with cluster(LOCAL):
        assert len(stand.processes) == 9
        assert stand.running == 3, "those of the starts that failed are gone"


@pytest.mark.parametrize("stand", [(LATE,) * 3, (OSError("no memory"),)], indirect=True)
def test_a_start_that_failed_leaves_nothing_behind(stand: Stand) -> None:
    told = r"cannot reach Ray at 'local': .*(timed out|no memory).*Check memory"
    with pytest.raises(EngineError, match=told), cluster(LOCAL):
        raise AssertionError
    assert stand.running == 0
