"""Real funnel searches of the digits network: their front, their weights, and what an interruption costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranksearch.data import load_data
from ranksearch.errors import SpaceError
from ranksearch.export import read_compressed
from ranksearch.funnel import Funnel
from ranksearch.handover import compare, compress, export_trial
from ranksearch.launch import open_study, resume, search
from ranksearch.models import digits_weights
from ranksearch.space import DataSpec
from ranksearch.storage import Store
from ranksearch.study import Study
from tests.conftest import REPOSITORY

QUICKSTART = REPOSITORY / "search_spaces" / "quickstart.yaml"
STEPS = {"settle_steps": 2, "penalty_steps": 28}
SETTINGS = [
    "data.train_images=400",
    "data.calibration_images=128",
    "data.search_images=200",
    "data.report_images=300",
    "evaluation.refit_images=128",
    "evaluation.select_images=64",
    "evaluation.fine_tune={steps: 10, batch_images: 32}",
    "strategy.name=funnel",
    "strategy.sampler=tpe",
    f"strategy.options={json.dumps(STEPS)}",
    "budget.targets=[0.5, 0.3]",
    "tracking.enabled=false",
]
DATA = DataSpec(train_images=400, calibration_images=128, search_images=200, report_images=300,
                mean=[0.3053], std=[0.3763])  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the trained network."""
    cache = tmp_path_factory.mktemp("prepared") / "cache"
    digits_weights(cache, load_data(DATA, cache=cache, seed=0))
    return cache


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:
    """A folder of studies, with the cache."""
    shutil.copytree(prepared, tmp_path / "studies" / "cache")
    return tmp_path / "studies"


def searched(folder: Path, *settings: str, trials: int = 2, name: str = "one") -> Study:
    changes = [*SETTINGS, f"budget.trials={trials}", *settings]
    return search(QUICKSTART, settings=changes, storage=folder, name=name)


def found(study: Study) -> list[dict[str, Any]]:
    """What came of every proposal in the end, without times and names of files."""
    last = {trial.index: trial for trial in study.trials()}
    return [
        {
            "settings": last[i].proposal.settings,
            "reason": last[i].reason,
            "outcome": last[i].outcome and last[i].outcome.to_json() | {"seconds": 0.0, "weights": None},  # type: ignore[union-attr]
        }
        for i in sorted(last)
    ]


def weights_of(study: Study) -> dict[int, str]:
    """Proposal to the hash of its weights, of the trials on the front."""
    hashes = {}
    for trial in study.front_trials():
        assert trial.outcome is not None
        state = load_file(study.weights_folder / str(trial.outcome.weights))
        content = b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(state.items()))
        hashes[trial.index] = hashlib.sha256(content).hexdigest()
    return hashes


@pytest.mark.slow
def test_runs_make_a_front_whose_points_are_handed_over(folder: Path, tmp_path: Path) -> None:
    study = searched(folder, "strategy.seeds=[]")
    trials = study.trials()
    assert [t.state for t in trials] == ["COMPLETE"] * 2
    dense = study.setting.dense
    for trial, target in zip(trials, (0.5, 0.3), strict=True):
        assert trial.outcome is not None
        assert target - 0.01 < trial.outcome.macs / dense["macs"] <= target
        history = trial.outcome.details["history"]
        assert [entry["phase"] for entry in history].count("fine-tune") == 10
        assert history[-1]["step"] == 40
        assert not list(study.checkpoints_folder.iterdir())
    assert [t.index for t in study.front_trials()] == [1, 0], "the cheaper one is at least not worse than nothing"
    # From the study's weights, and, once they are gone, from the seed: the same bits.
    exported = []
    for name in ("kept", "rebuilt"):
        file, weights = tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"
        rank_map = export_trial(study, trials[0], Store(folder), file, weights=weights)
        exported.append(load_file(weights))
        comparison = compare(file, storage=folder)
        assert trials[0].outcome is not None
        assert comparison.compressed.accuracy == trials[0].outcome.accuracy == rank_map.metrics["accuracy"]
        assert comparison.compressed.macs == trials[0].outcome.macs == rank_map.macs
        assert comparison.compressed.params == trials[0].outcome.params == rank_map.params
        assert read_compressed(weights)[0].layers == rank_map.layers
        shutil.rmtree(study.weights_folder, ignore_errors=True)
    torch.testing.assert_close(exported[0], exported[1], rtol=0, atol=0)
    assert not list(study.checkpoints_folder.iterdir())
    afresh = compress(tmp_path / "kept.json", tmp_path / "afresh.safetensors", storage=folder)
    assert afresh.macs == rank_map.macs


@pytest.mark.slow
def test_runs_join_the_front_of_another_strategy_and_pinned_layers_keep_their_choice(folder: Path) -> None:
    pins = json.dumps({"block1.conv1": {"format": "cp", "ranks": [20]}, "block2.conv1": "dense"})
    seeded = ["strategy.name=optuna", "strategy.options={}", "strategy.seeds=[funnel, uniform]"]
    # So few steps that a run is on the front only if they are large.
    tune = "{steps: 2, batch_images: 32, optimiser: sgd, batch_norm: batch}"
    short = [f"evaluation.fine_tune={tune}", "strategy.seed_points=1"]
    study = searched(folder, *seeded, *short, f"fix={pins}", trials=3)
    run, uniform, suggested = study.trials()
    assert [t.proposal.origin for t in (run, uniform, suggested)] == ["funnel", "uniform", "optuna"]
    rank_map = study.rank_map(trial=0)
    assert rank_map.layers["block1.conv1"].ranks == (20,)
    assert "block2.conv1" not in rank_map.layers
    assert run.outcome is not None
    assert 0.49 < run.outcome.macs / study.setting.dense["macs"] <= 0.5
    assert run.outcome.details["fitted"].keys() == {"block1.conv1"}
    assert {t.index for t in study.front_trials()} & {0}


def test_formats_that_cannot_be_gated_leave_no_study(folder: Path) -> None:
    with pytest.raises(SpaceError, match=r"\$\.formats"):
        searched(folder, "formats=[cp, tkd-cp]")
    assert Store(folder).names() == []


SCRIPT = """
import sys
from ranksearch.launch import search
if __name__ == "__main__":
    folder, space, *settings = sys.argv[1:]
    search(space, settings=settings, storage=folder, name="one")
"""


def killed_at_a_checkpoint(folder: Path, settings: list[str]) -> int:
    """Run a search until its first trial has left a checkpoint, kill it, and return the steps that are in that."""
    (folder / "driver.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(folder / "driver.py"), str(folder), str(QUICKSTART), *settings],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    checkpoint = folder / "studies" / "one" / "checkpoints" / "0.pt"
    deadline = time.monotonic() + 200
    try:
        while not checkpoint.exists():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline, "the driver is too slow"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return int(torch.load(checkpoint, weights_only=True)["steps"])


@pytest.mark.slow
def test_a_run_killed_in_its_middle_goes_on_from_its_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = killed_at_a_checkpoint(folder, [*SETTINGS, "budget.trials=2"])
    assert [t.state for t in open_study("one", storage=folder).trials()][:1] == ["RUNNING"]
    made: list[int] = []
    step = Funnel.step

    def counted(run: Funnel) -> None:
        step(run)
        made.append(run.steps)

    monkeypatch.setattr(Funnel, "step", counted)
    study = resume("one", storage=folder)
    assert 0 < steps < 40
    assert made[: 40 - steps] == list(range(steps + 1, 41)), "what the checkpoint has is not done again"
    assert len(made) == 40 - steps + 40
    assert not list(study.checkpoints_folder.iterdir())
    shutil.copytree(folder / "cache", tmp_path / "whole" / "cache")
    whole = searched(tmp_path / "whole")
    assert found(study) == found(whole)
    assert weights_of(study) == weights_of(whole)
