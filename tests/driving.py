"""A real search of trials that are looked up in a table: the driver that tests and benchmarks kill.

``python -m tests.driving PLAN.json`` starts the search or goes on with it, just as ``ranksearch search`` and ``resume``
do from where the network is prepared: the study, its lock, MLflow, the driver and the engine are the product's.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ranksearch.driver import finished
from ranksearch.engine import Evaluate
from ranksearch.engine.limit import GRACE_S
from ranksearch.launch import drive
from ranksearch.space import Space
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Outcome, Task, Trial
from tests.conftest import REPOSITORY
from tests.studies import TABLE, setting_of
from tests.tables import table_outcome

NAME = "one"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One search, and what is to go wrong in its trials."""

    folder: str
    """Of the study's files."""
    storage: str
    """As ``--storage`` has it."""
    sections: Mapping[str, Any]
    """Of the space."""
    seconds: float = 0.0
    """How long a trial takes."""
    accidents: Mapping[str, str] = field(default_factory=dict)
    """Number of a proposal to what happens in it: ``nan``, ``inf``, ``exhaust``, ``hang``, ``deaf``, ``die``,
    ``late``."""
    patience_s: float = 600.0
    held: bool = False
    """Whether no trial ends before it is released."""

    @property
    def space(self) -> Space:
        return Space.model_validate({"model": {"name": "table"}, **self.sections})

    @property
    def store(self) -> Store:
        return Store(self.storage, patience_s=self.patience_s)

    def study(self) -> Study:
        """The study, to read."""
        return self.store.open(NAME)

    def start(self, *program: str) -> subprocess.Popen[bytes]:
        """A driver, in a process and a session of its own; ``program``: another module, its arguments but the plan."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        plan = Path(self.folder, "plan.json")
        plan.write_text(json.dumps(asdict(self)))
        with Path(self.folder, "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *(program or ("tests.driving",)), str(plan)],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": self.folder},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(self, seconds: float = 240.0) -> None:
        """Let a driver run to its end."""
        driver = self.start()
        try:
            assert driver.wait(seconds) == 0, self.log
        finally:
            driver.kill()
            driver.wait()

    def release(self, trials: int = sys.maxsize) -> None:
        """Let the trials of so many proposals end, of a plan that is ``held``."""
        part = Path(self.folder, "releasing")
        part.write_text(str(trials))
        part.replace(Path(self.folder, "released"))

    def released(self, index: int) -> bool:
        """Whether the trials of a proposal may end."""
        with suppress(FileNotFoundError):
            return not self.held or index < int(Path(self.folder, "released").read_text())
        return False

    @property
    def log(self) -> str:
        return Path(self.folder, "driver.log").read_text()

    def evaluated(self) -> int:
        """How many evaluations were begun, whatever became of them."""
        return len(list(Path(self.folder).glob("evaluation-*")))

    def workers(self) -> set[str]:
        """The processes that have begun an evaluation."""
        return {path.name.rsplit("-", 1)[1] for path in Path(self.folder).glob("evaluation-*")}

    def wait(self, evaluations: int, driver: subprocess.Popen[bytes], seconds: float = 240.0) -> None:
        """Wait until so many evaluations were begun."""
        deadline = time.monotonic() + seconds
        while self.evaluated() < evaluations:
            assert driver.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Accidents:
    """A factory of evaluators by the table, with a plan's accidents."""

    plan: Plan

    def __call__(self) -> Evaluate:
        if "exhaust" in self.plan.accidents.values():
            import torch  # noqa: F401  (here, since the seconds that it takes would count as the trial's)
        return self._evaluate

    def _evaluate(self, task: Task) -> Outcome:
        name = f"evaluation-{task.index}-{task.number}-{os.getpid()}"
        with suppress(OSError):  # where the disk is full
            Path(self.plan.folder, name).touch()
        time.sleep(self.plan.seconds)
        while not self.plan.released(task.index):
            time.sleep(0.05)
        outcome = table_outcome(TABLE, task.choices)
        match self.plan.accidents.get(str(task.index)):
            case "nan":
                return replace(outcome, loss=math.nan)
            case "inf":
                return replace(outcome, loss=math.inf)
            case "exhaust":
                import torch

                device = "cuda" if torch.cuda.is_available() else "cpu"
                torch.empty(1 << 50, dtype=torch.uint8, device=device)  # a thousand terabytes
            case "hang":
                time.sleep(3600)
            case "deaf":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
                time.sleep(3600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":  # by somebody else, when it should have ended itself
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
                time.sleep(60 * (self.plan.space.resources.trial_minutes or 0.0) + GRACE_S + 1)
                os.kill(os.getpid(), signal.SIGKILL)
        return outcome


def main() -> None:
    """Start or go on with the search of a plan."""
    document = json.loads(Path(sys.argv[1]).read_text())
    plan = Plan(**document)
    store, space = plan.store, plan.space
    if NAME not in store.names():
        store.create(NAME, setting_of(space))
    study = store.open(NAME)
    with study.driving(), store.explained():
        study.recover()
        study.extend(space.budget.trials)
        factory = None if finished(study) else Accidents(plan=plan)
        if not space.tracking.enabled:
            drive(study, factory, [], None, lambda *_: None, None)
            return
        from ranksearch.tracking import connected

        with connected(study.space, Path(plan.folder)) as tracker:
            drive(study, factory, [], tracker, lambda *_: None, None)


def check_study(study: Study, trials: int) -> list[Trial]:
    """Every proposal ended exactly once, COMPLETE or FAIL with a reason; returns the last tries in order."""
    found = study.trials()
    assert [trial.number for trial in found] == list(range(len(found))), "a trial has a number of its own"
    assert {trial.state for trial in found} <= {"COMPLETE", "FAIL"}, "nothing is left RUNNING"
    assert all(trial.reason for trial in found if trial.state == "FAIL"), "every failure has its reason"
    ended = [trial for trial in found if not trial.retry]
    assert sorted(trial.index for trial in ended) == list(range(trials)), "every proposal ended exactly once"
    tries = {(trial.index, trial.attempt) for trial in found}
    assert len(tries) == len(found), "no try of a proposal is there twice"
    for trial in found:
        assert not trial.retry or (trial.index, trial.attempt + 1) in tries, "what was interrupted was tried again"
    return sorted(ended, key=lambda trial: trial.index)


def check_mlflow(uri: str, study: Study) -> None:
    """One finished run per trial under one parent, the only ones of their experiment, with every metric once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study.space.tracking.experiment)
    assert experiment is not None
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], page_token=token, max_results=500)
        runs += page
        token = page.token
        if not token:
            break
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) + 1 == len(runs), "no orphan"
    trials = study.trials()
    assert sorted(int(run.data.tags["ranksearch.trial"]) for run in children) == [t.number for t in trials]
    for run in children:
        trial = trials[int(run.data.tags["ranksearch.trial"])]
        assert run.info.status == ("FINISHED" if trial.state == "COMPLETE" else "FAILED")
        assert run.data.tags["state"] == trial.state
        if trial.outcome is not None:
            assert run.data.metrics["accuracy_search"] == trial.outcome.accuracy_search
            assert len(run.data.params) == len(TABLE.layers)
        else:
            assert run.data.tags["reason"] == trial.reason
    steps = [point.step for point in client.get_metric_history(parents[0].info.run_id, "hypervolume")]
    assert sorted(steps) == [trial.number for trial in trials], "no hypervolume is lost or there twice"


if __name__ == "__main__":
    main()
