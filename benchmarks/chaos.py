"""A search among faults: every few seconds something that it stands on is killed, and nothing may be lost or doubled.

``python -m benchmarks.chaos [trials] [seeds] [ray|local]`` from the root of the repository; it prints Markdown, and
ends with an error where a row has anything but zeros. It needs PostgreSQL's server (see ``tests/services.py``). With
``local`` there is no cluster, and so no worker or machine to kill.

The trials are looked up in a table and take a fraction of a second; all else is real: a Ray cluster of a head and two
machines on this host, PostgreSQL under the study and under MLflow, an MLflow server, and a driver as a process, which
is started again whenever it has ended. The faults, one drawn at random after a pause drawn at random: SIGKILL of the
driver, of a worker, of a machine of the cluster (another one joins), a crash of PostgreSQL, SIGKILL of the MLflow
server (both start again after a pause), SIGSTOP of the driver for a while. After each the next one waits until another
trial has begun, or a slow machine would never get anywhere.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from mlflow import MlflowClient
from mlflow.entities import Run
from ray.cluster_utils import Cluster

from ranksearch.preparation import versions
from tests.driving import Plan
from tests.services import MlflowServer, Postgres, add_machine, patient, postgres

PAUSE_S = (2.0, 6.0)
"""Least and most time from one fault to the next."""
AWAY_S = (2.0, 10.0)
"""Least and most time that a service is away, or the driver stopped."""
TRIAL_S = 0.5


class Chaos:
    """One search and what is done to it."""

    def __init__(self, plan: Plan, cluster: Any | None, database: Postgres, mlflow: MlflowServer, seed: int) -> None:
        self._plan = plan
        self._cluster = cluster
        self._database = database
        self._mlflow = mlflow
        self._rng = np.random.default_rng(seed)
        self._machines = [self._machine() for _ in range(2)] if cluster is not None else []
        self._driver: subprocess.Popen[bytes] | None = None
        self.faults: Counter[str] = Counter()
        self.drivers = 0

    def run(self) -> None:
        """Start the search and let nothing rest until it has ended by itself."""
        faults: list[Callable[[], None]] = [self.kill_driver, self.crash_database, self.kill_mlflow, self.freeze]
        if self._cluster is not None:
            faults += [self.kill_worker, self.kill_machine]
        seen = 0
        try:
            while not self._ended():
                self._sleep(PAUSE_S)
                if self._driver is not None and self._driver.poll() is None:
                    fault = faults[int(self._rng.integers(len(faults)))]
                    if (begun := self._plan.evaluated()) > seen:
                        fault()
                        seen = begun
                        self.faults[fault.__name__.replace("_", " ")] += 1
        finally:
            self.kill_driver()
            if self._cluster is not None:
                for machine in self._machines:
                    self._cluster.remove_node(machine)

    def kill_driver(self) -> None:
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()

    def kill_worker(self) -> None:
        """The one that began the last evaluation that is known of."""
        begun = sorted(Path(self._plan.folder).glob("evaluation-*"), key=lambda path: path.stat().st_mtime_ns)
        pid = int(begun[-1].name.rsplit("-", 1)[1])
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"ray::" in command.read_bytes():
            os.kill(pid, signal.SIGKILL)

    def kill_machine(self) -> None:
        assert self._cluster is not None
        at = int(self._rng.integers(len(self._machines)))
        self._cluster.remove_node(self._machines[at], allow_graceful=False)
        self._machines[at] = self._machine()

    def _machine(self) -> Any:
        assert self._cluster is not None
        return add_machine(self._cluster)

    def crash_database(self) -> None:
        self._database.crash()
        self._sleep(AWAY_S)
        self._database.start()

    def kill_mlflow(self) -> None:
        self._mlflow.stop(signal.SIGKILL)
        self._sleep(AWAY_S)
        self._mlflow.start()

    def freeze(self) -> None:
        assert self._driver is not None
        self._driver.send_signal(signal.SIGSTOP)
        self._sleep(AWAY_S)
        self._driver.send_signal(signal.SIGCONT)

    def _ended(self) -> bool:
        """Whether the driver ended in good order; it is started again where it did not."""
        if self._driver is None or self._driver.poll() not in (None, 0):
            self._driver = self._plan.start()
            self.drivers += 1
        return self._driver.poll() == 0

    def _sleep(self, between: tuple[float, float]) -> None:
        time.sleep(float(self._rng.uniform(*between)))


def counted(plan: Plan, uri: str, trials: int) -> dict[str, int]:
    """What must be zero, counted in the study and in MLflow as they are read afresh."""
    study = plan.study()
    found = study.trials()
    ended = Counter(trial.index for trial in found if not trial.retry and trial.state in ("COMPLETE", "FAIL"))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study.space.tracking.experiment)
    assert experiment is not None
    runs: list[Run] = []
    token = None
    while token is not None or not runs:
        page = client.search_runs([experiment.experiment_id], max_results=500, page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = Counter(
        int(run.data.tags["ranksearch.trial"]) for run in runs if run.data.tags.get("mlflow.parentRunId") in parents[:1]
    )
    steps = Counter(point.step for point in client.get_metric_history(parents[0], "hypervolume"))
    return {
        "lost": sum(index not in ended for index in range(trials)),
        "duplicated": sum(count - 1 for count in ended.values()) + sum(index >= trials for index in ended),
        "left RUNNING": sum(trial.state == "RUNNING" for trial in found),
        "failed without a reason": sum(trial.state == "FAIL" and not trial.reason for trial in found),
        "trials without a run": sum(trial.number not in children for trial in found),
        "orphan or doubled runs": len(runs) - 1 - len(children.keys() & {trial.number for trial in found}),
        "runs left RUNNING": sum(run.info.status == "RUNNING" for run in runs),
        "metrics lost or doubled": sum(steps[trial.number] != 1 for trial in found),
    }


def main() -> None:
    """Print the table."""
    given = sys.argv[1:]
    trials, seeds = int(given[0]) if given else 300, int(given[1]) if len(given) > 1 else 3
    on_ray = given[2:] != ["local"]
    found = versions()
    machine = f"{found.pop('platform')}, {found.pop('cores')} cores"
    print("# A search among faults\n")
    engine = "up to 4 Ray workers" if on_ray else "the local engine"
    print(f"{trials} trials of {TRIAL_S} s on {engine}, a fault every {PAUSE_S[0]:g} to {PAUSE_S[1]:g} s: "
          "`python -m benchmarks.chaos` says in its first lines which.\n")  # fmt: skip
    print(f"Machine: {machine}. Versions: {', '.join(f'{k} {v}' for k, v in found.items())}.\n", flush=True)
    rows: list[tuple[str, dict[str, int]]] = []
    with postgres() as database, tempfile.TemporaryDirectory(prefix="ranksearch-chaos-") as folder:
        mlflow = MlflowServer(Path(folder), database.url("mlflow"))
        mlflow.start()
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = patient(lambda: Cluster(initialize_head=True, head_node_args=head)) if on_ray else None
        try:
            for seed in range(seeds):
                rows.append(measured(seed, trials, Path(folder, str(seed)), cluster, database, mlflow))
                print(f"Seed {seed}: {rows[-1][0]}.\n", flush=True)
        finally:
            if cluster is not None:
                cluster.shutdown()
            mlflow.stop()
    names = list(rows[0][1])
    print(f"| seed | {' | '.join(names)} |\n|{'---:|' * (1 + len(names))}")
    for seed, (_, counts) in enumerate(rows):
        print(f"| {seed} | {' | '.join(str(count) for count in counts.values())} |")
    sys.exit(int(any(any(counts.values()) for _, counts in rows)))


def measured(
    seed: int, trials: int, folder: Path, cluster: Any | None, database: Postgres, mlflow: MlflowServer
) -> tuple[str, dict[str, int]]:
    """One search: what was done to it, and what must be zero."""
    sections = {
        "budget": {"trials": trials},
        "strategy": {"name": "random"},
        "resources": {} if cluster is None else {"engine": "ray", "address": cluster.address},
        "tracking": {"uri": mlflow.uri, "experiment": f"chaos-{seed}"},
        "deterministic": False,
        "seed": seed,
    }
    plan = Plan(folder=str(folder), storage=database.url(f"study{seed}"), sections=sections, seconds=TRIAL_S)
    chaos = Chaos(plan, cluster, database, mlflow, seed)
    began = time.monotonic()
    chaos.run()
    plan.finish()  # what MLflow lacked where it was away at the end
    done = ", ".join(f"{count} x {name}" for name, count in sorted(chaos.faults.items()))
    tries = len(plan.study().trials())
    story = (
        f"{sum(chaos.faults.values())} faults in {time.monotonic() - began:.0f} s ({done}), {chaos.drivers} drivers, "
        f"{tries} tries for {trials} proposals"
    )
    return story, counted(plan, mlflow.uri, trials)


if __name__ == "__main__":
    main()
