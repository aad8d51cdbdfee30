"""What MLflow tells of a search, and a published network that answers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS

from ranksearch.errors import TrackingError
from ranksearch.export import choose, load_compressed
from ranksearch.handover import export_trial
from ranksearch.launch import search
from ranksearch.models import build_model
from ranksearch.publishing import publish
from ranksearch.space import TrackingSpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.tracking import Tracker, View
from ranksearch.tracking.registry import _name
from ranksearch.tracking.story import COLUMNS, about, view_key
from ranksearch.trial import Failure, Proposal
from tests.studies import TABLE, setting_of, space_of
from tests.tables import proposal_outcome


def searched(study: Study, view: View, trials: int) -> set[int]:
    """Random trials, each told to MLflow as it ends; returns those that were on the front then."""
    strategy = build_strategy(
        space_of(strategy={"name": "random"}).strategy, Terms(seed=4, objectives=("accuracy", "macs"))
    )
    once = set()
    for index in range(trials):
        proposal = strategy.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        trial = study.begin(proposal, index=index)
        trial = study.finish(
            trial, Failure(reason="out of memory") if index == 1 else proposal_outcome(TABLE, proposal)
        )
        once |= {trial.number} & {one.number for one in study.front_trials()}
        view.trial(trial)
    return once


def runs_of(client: MlflowClient) -> tuple[Run, dict[int, Run], Any]:
    experiment = client.get_experiment_by_name("ranksearch")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = (run for run in found if run.data.tags["ranksearch.kind"] == "search")
    trials = {int(r.data.tags["ranksearch.trial"]): r for r in found if r.data.tags["ranksearch.kind"] == "trial"}
    return parent, trials, experiment


def test_the_run_tells_the_story_and_beyond_the_limit_only_the_front_has_runs(storage: Path) -> None:
    study = Store().create("told", setting_of(space_of(tracking={"max_runs": 4}, strategy={"name": "random"})))
    with closing(Tracker(TrackingSpec(), folder=storage)) as tracker:
        view = View(study, tracker)
        client = MlflowClient(tracking_uri=tracker.uri)
        parent, _, _ = runs_of(client)
        assert "ranksearch dashboard told" in parent.data.tags["mlflow.note.content"]
        once = searched(study, view, 25)
        view.finish("FINISHED")
    parent, trials, experiment = runs_of(client)
    front = set(study.front()["trial"])
    assert front <= once < set(range(25))
    assert trials.keys() == {0, 1, 2, 3} | once
    assert {n for n, run in trials.items() if run.data.tags["on_front"] == "true"} == front
    assert trials[1].data.tags["mlflow.note.content"].startswith("**Failed:** out of memory")
    assert trials[0].data.tags["strategy"] == "random"

    note = parent.data.tags["mlflow.note.content"]
    assert f"get-artifact?path=front.png&run_uuid={parent.info.run_id}" in note
    assert "ranksearch publish told" in note
    assert all(f"| {number} |" in note for number in front)
    contexts = {one.tags[0].value: one.dataset.name for one in parent.inputs.dataset_inputs}
    assert contexts == {
        "training": "digits, training images",
        "validation": "digits, search images",
        "testing": "digits, report images",
    }
    state = json.loads(experiment.tags[f"mlflow.sharedViewState.{view_key('told')}"])
    assert state["selectedColumns"] == list(COLUMNS)
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "pictures")}
    names = ("hypervolume", "hypervolume_over_time", "ranks", "macs", "sensitivity", "importance")
    assert pictures == {f"pictures/{name}.png" for name in names}
    assert "pictures.html" in {file.path for file in client.list_artifacts(parent.info.run_id)}

    with closing(Tracker(TrackingSpec(), folder=storage)) as tracker:
        View(study, tracker).sync(study.trials())
    assert runs_of(client)[1].keys() == trials.keys(), "a resume adds no run that the search left out"


def test_a_long_front_is_told_from_its_dearest_point_to_its_cheapest(storage: Path) -> None:
    study = Store().create("long", setting_of(space_of(tracking={"enabled": False})))
    proposal = Proposal(choices=TABLE.dense, origin="test")
    scored = proposal_outcome(TABLE, proposal)
    for n in range(14):
        point = replace(scored, accuracy_search=0.9 - 0.01 * n, accuracy=0.9, macs=scored.macs - n)
        study.finish(study.begin(proposal, index=n), point)
    assert len(study.front()) == 14
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", about(study, "run"), flags=re.MULTILINE)]
    assert (rows[0], rows[-1], len(rows)) == (0, 13, 12)
    assert rows == sorted(set(rows))


class Registry(MlflowClient):
    """A registry that refuses new names."""

    def __init__(self, code: int) -> None:
        self.code = code

    def create_registered_model(self, *_: Any, **__: Any) -> Any:
        raise MlflowException("refused", self.code)


def test_only_a_name_that_is_there_already_is_no_error() -> None:
    _name(Registry(RESOURCE_ALREADY_EXISTS), "digits")
    with pytest.raises(MlflowException, match="refused"):
        _name(Registry(PERMISSION_DENIED), "digits")


def test_a_study_that_is_not_tracked_cannot_be_published(storage: Path) -> None:
    study = Store().create("alone", setting_of(space_of(tracking={"enabled": False})))
    proposal = Proposal(choices=TABLE.dense, origin="test")
    trial = study.finish(study.begin(proposal, index=0), proposal_outcome(TABLE, proposal))
    with pytest.raises(TrackingError, match="alone was not"):
        publish(study, trial, Store(), alias="champion")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_published_network_answers_as_the_exported_one(storage: Path, tmp_path: Path, repository: Path) -> None:
    space = repository / "search_spaces" / "quickstart.yaml"
    study = search(space, settings=["budget.trials=4"], name="served")
    store, trial = Store(), choose(study, knee_point=True)
    publish(study, trial, store, alias="champion")
    found = publish(study, trial, store, alias="champion", model="digits-cnn")
    assert (found.model, found.version) == ("digits-cnn", "2")
    client = MlflowClient(tracking_uri=found.uri)
    version = client.get_model_version_by_alias("digits-cnn", "champion")
    assert (str(version.version), version.tags["trial"]) == ("2", str(trial.number))

    weights = tmp_path / "compressed.safetensors"
    rank_map = export_trial(study, trial, store, tmp_path / "rank_map.json", weights=weights)
    network = load_compressed(rank_map, build_model(study.space.model, weights=None), weights)
    images = np.random.default_rng(0).standard_normal((3, *rank_map.model.input_shape)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    assert np.allclose(answer(found.uri, images, tmp_path), expected, atol=1e-4)


def answer(uri: str, images: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    """What `mlflow models serve` answers to the images, where ranksearch cannot be imported."""
    without = folder / "without" / "ranksearch"
    without.mkdir(parents=True)
    (without / "__init__.py").write_text("raise ImportError('there is no ranksearch here')\n", encoding="utf-8")
    # MLflow finds the server's program on the path.
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(without.parent), "PATH": programs}
    missing = subprocess.run([sys.executable, "-c", "import ranksearch"], env=env, cwd=folder, capture_output=True)
    assert b"there is no ranksearch here" in missing.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits-cnn@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"inputs": images.tolist()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        for _ in range(400):
            assert process.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return np.array(json.load(reply)["predictions"])
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise AssertionError("no answer")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
