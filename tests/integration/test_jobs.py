"""A search as a job on two Ray nodes, started by Ray's commands: submitted, followed, stopped, resumed, exported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from ranksearch.jobs import JobServer
from ranksearch.storage import Store
from tests.conftest import REPOSITORY
from tests.services import NODE, free_port, ray_node

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = "sehr-geheim-4711"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    address: str
    """Of the job server."""
    gcs: str
    """Of the head, for other nodes and drivers."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each, for all tests of this file."""
    port, dashboard = free_port(), free_port()
    found = Cluster(address=f"http://127.0.0.1:{dashboard}", gcs=f"127.0.0.1:{port}")
    # The agent, which takes the jobs, has a port of its own too: another Ray on this machine may have the usual one.
    agent = f"--dashboard-agent-listen-port={free_port()}"
    with ray_node(*NODE, "--head", f"--port={port}", f"--dashboard-port={dashboard}", agent, "--num-cpus=1"):
        await_nodes(found, 1)
        with ray_node(*NODE, f"--address={found.gcs}", "--num-cpus=1"):
            await_nodes(found, 2)
            yield found


def await_nodes(cluster: Cluster, count: int) -> None:
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            answer = requests.get(f"{cluster.address}/nodes?view=summary", headers=headers, timeout=10).json()
            if len([one for one in answer["data"]["summary"] if one["raylet"].get("state") == "ALIVE"]) == count:
                return
        assert time.monotonic() < deadline, f"the cluster has not {count} nodes"
        time.sleep(1)


def ranksearch(*arguments: str, code: int = 0, **environment: str) -> str:
    """What a command prints."""
    run = subprocess.run(
        [sys.executable, "-m", "ranksearch", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )
    assert run.returncode == code, f"{run.returncode}: {run.stdout}\n{run.stderr}"
    return run.stdout + run.stderr


def wait_for(text: str, job: str, cluster: Cluster) -> str:
    deadline = time.monotonic() + 300
    server = JobServer(cluster.address)
    while text not in (log := server.logs(job)):
        assert not server.job(job).ended, log
        assert time.monotonic() < deadline, log
        time.sleep(1)
    return log


NET = """
import os
from torch import nn


def net(token):
    assert token.startswith("sehr") and len(token) == 16, "the secret did not travel"
    with open(os.path.join(os.environ["MARKS"], f"{os.uname().nodename}-{os.getpid()}"), "w"):
        pass
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )
"""
SPACE = """
model: {name: "own_net:net", options: {token: "${NET_TOKEN}"}}
data: {source: digits}
budget: {trials: 1000}
strategy: {name: random}
evaluation: {fine_tune: {steps: 20}}
resources: {workers: 2}
"""


def test_submit_follow_stop_resume_export(cluster: Cluster, tmp_path: Path) -> None:
    project, storage, marks = tmp_path / "project", tmp_path / "studies", tmp_path / "marks"
    project.mkdir()
    marks.mkdir()
    (project / "own_net.py").write_text(NET)
    (project / "mine.yaml").write_text(SPACE)
    to = ("--address", cluster.address)
    space = (
        "submit", str(project / "mine.yaml"), "--storage", str(storage), *to,
        "--set", f"job.python={sys.executable}", "--set", f"job.environment={{MARKS: {marks}}}",
    )  # fmt: skip
    submitted = ranksearch(*space, NET_TOKEN=SECRET)
    (job,) = set(re.findall(r"ranksearch-mine-\w{6}", submitted))
    wait_for("trial    1", job, cluster)
    assert json.loads(ranksearch("status", job, "--json", *to))["state"] == "RUNNING"
    assert job in ranksearch("jobs", *to)

    assert f"{job}: STOPPED" in ranksearch("stop", job, *to)
    assert "Interrupted" in ranksearch("logs", job, *to)
    stopped = Store(storage).open("mine").trials()
    assert not [trial for trial in stopped if trial.state == "RUNNING"]
    assert len([trial for trial in stopped if trial.state == "COMPLETE"]) >= 2

    made = len({trial.index for trial in stopped})
    resume = (*space, "--resume", "--set", f"budget.trials={made + 4}", "--follow")
    followed = ranksearch(*resume, NET_TOKEN=SECRET)
    assert followed.count(f"({made + 4}/{made + 4})") == 1
    assert "SUCCEEDED" in followed
    ended = Store(storage).open("mine")
    done = {trial.index for trial in ended.trials() if trial.state == "COMPLETE"}
    assert done == set(range(made + 4))

    rank_map, weights = tmp_path / "map.json", tmp_path / "compressed.safetensors"
    export = ("export", "mine", "--knee", "-o", str(rank_map), "--storage", str(storage))
    ranksearch(*export, "--save-weights", str(weights), NET_TOKEN=SECRET, MARKS=str(marks))
    assert json.loads(rank_map.read_text())["model"]["name"] == "own_net:net"

    assert len(list(marks.iterdir())) >= 3, "a driver and two workers built the user's network"
    shown = submitted + followed + json.dumps([str(one) for one in JobServer(cluster.address).jobs()])
    details = JobServer(cluster.address)._client.list_jobs()
    assert SECRET not in shown + str([one.model_dump() for one in details])
    for file in (*storage.rglob("*"), rank_map):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_job_that_fails_says_why(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {name: resnet20, weights: /no/such/file.safetensors}\n")
    arguments = ("submit", str(tmp_path / "wrong.yaml"), "--address", cluster.address, "--follow")
    printed = ranksearch(*arguments, "--set", f"job.python={sys.executable}", code=1)
    assert "the weights file /no/such/file.safetensors must exist" in printed
    assert "FAILED" in printed


def test_auto_is_the_cluster_of_this_machine(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray would take the head that was started last, which may be another test's.
    monkeypatch.setenv("RAY_ADDRESS", cluster.gcs)
    assert JobServer("auto").jobs() == JobServer(cluster.address).jobs()


def test_a_wrong_token_and_a_wrong_name(cluster: Cluster, tmp_path: Path) -> None:
    to = ("--address", cluster.address)
    assert "must be given its token, found one that" in ranksearch("jobs", *to, code=2, RAY_AUTH_TOKEN="x" * 64)
    missing = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert "must be given its token, found none" in ranksearch("jobs", *to, code=2, **missing)
    assert "there must be a job 'nosuch'" in ranksearch("status", "nosuch", *to, code=2)
    assert "there must be a job 'nosuch'" in ranksearch("logs", "-f", "nosuch", *to, code=2)
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert f"job server at {nowhere} cannot be used" in ranksearch("jobs", "--address", nowhere, code=2)


def test_doctor_looks_at_every_machine(cluster: Cluster, tmp_path: Path) -> None:
    storage = tmp_path / "studies"
    place = ("--address", cluster.gcs, "--storage", str(storage))
    assert f"2 machines, all with the versions of this one, all share {storage}" in ranksearch("doctor", *place)
    assert not storage.exists(), "nothing is left behind"

    storage.mkdir()
    other = f"mount -t tmpfs none {storage}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", other], capture_output=True, check=False).returncode:
        pytest.skip("a machine that does not share the folder takes the right to mount")
    with ray_node("-c", third_machine(cluster, f"{other} && exec")):
        await_nodes(cluster, 3)
        printed = ranksearch("doctor", *place, code=1)
    assert printed.count(f"does not share {storage}") == 1
    assert "give a folder that all of them mount" in printed

    await_nodes(cluster, 2)
    small = tmp_path / "small"
    small.mkdir()
    with ray_node("-c", third_machine(cluster, f"mount -t tmpfs -o size=64m none {small} && TMPDIR={small} exec")):
        await_nodes(cluster, 3)
        printed = ranksearch("doctor", *place, code=0)
    assert printed.count(f"has 0.1 GiB free in {small}") == 1
    assert "Free some space there" in printed


def third_machine(cluster: Cluster, run: str) -> str:
    """A program that becomes a machine of the cluster, with mounts of its own."""
    node = " ".join([sys.executable, *NODE, f"--address={cluster.gcs}", "--num-cpus=1"])
    return f"import os; os.execvp('unshare', ['unshare', '--mount', 'sh', '-c', '{run} {node}'])"
