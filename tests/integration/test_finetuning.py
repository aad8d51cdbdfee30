"""Fine-tuning a rank map: it learns, it is recorded, and a kill at any moment changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from torch import nn

from ranksearch.cli import main
from ranksearch.data import load_data
from ranksearch.errors import ModelError, RankMapError
from ranksearch.finetuning import FineTuned, finetune
from ranksearch.handover import compare
from ranksearch.models import build_model
from ranksearch.rankmap import RankMap
from ranksearch.retraining import Retraining, Schedule
from ranksearch.space import AugmentSpec, DataSpec, FineTuneSpec, ModelSpec, TrackingSpec
from tests.killed import fine_tune_in_child
from tests.maps import rank_map_for

DATA = DataSpec(train_images=320, calibration_images=64, search_images=100, report_images=200, mean=[0.3], std=[0.4])
SGD: dict[str, Any] = {"optimiser": "sgd", "batch_norm": "batch"}
SPEC = FineTuneSpec(epochs=6, batch_images=32, learning_rate=0.05, distill=0.2, **SGD)
"""Sixty steps."""
EPOCHS = 30
"""Of the training that is killed."""
SHAPE = (1, 8, 8)


@pytest.fixture
def rank_map(tmp_path: Path) -> Path:
    """A map of the digits network, untrained, at half of its ranks; one of its layers is fitted."""
    dense = build_model(ModelSpec(name="digits-cnn"), weights=None)
    weights = tmp_path / "dense.safetensors"
    save_file(dense.state_dict(), weights)
    ranks: dict[str, tuple[str, tuple[int, ...]]] = {
        "block1.conv1": ("tucker2", (16, 16)),
        "block2.conv2": ("spatial-svd", (48,)),
        "block3.conv1": ("cp", (40,)),
    }
    made = rank_map_for("digits-cnn", dense, SHAPE, ranks, provenance={"data": DATA.model_dump(mode="json")})
    record = made.model.model_copy(update={"weights": str(weights)})
    file = tmp_path / "map.json"
    made.model_copy(update={"model": record}).save(file)
    return file


def weights_of(found: FineTuned) -> dict[str, torch.Tensor]:
    return load_file(found.files[1])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_learns_and_writes_what_evaluates_to_what_it_says(rank_map: Path, tmp_path: Path) -> None:
    found = finetune(rank_map, tmp_path / "tuned.json", spec=SPEC, baseline=True, ema_decay=0.9)
    assert found.scores["after"].accuracy > found.scores["before"].accuracy + 0.3
    assert found.scores["baseline"].accuracy > found.scores["dense"].accuracy + 0.3
    assert [path.name for path in found.files] == ["tuned.json", "tuned.safetensors", "tuned-dense.safetensors"]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set(), "checkpoints are left"

    again = RankMap.load(tmp_path / "tuned.json")
    assert again.layers == RankMap.load(rank_map).layers
    assert again.metrics["accuracy"] == found.scores["after"].accuracy
    assert again.metrics["dense_accuracy_finetuned"] == found.scores["baseline"].accuracy
    assert again.provenance["finetune"]["epochs"] == 6
    compared = compare(tmp_path / "tuned.json")
    assert compared.factors == "stored"
    assert compared.compressed.accuracy == found.scores["after"].accuracy
    alike = compare(tmp_path / "tuned.json", weights=found.files[2])
    assert alike.dense.accuracy == found.scores["baseline"].accuracy


class Killed(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_one_ends_in_the_same_bits_and_in_one_run(rank_map: Path, tmp_path: Path) -> None:
    def interrupt(name: str, epoch: Any) -> None:
        if epoch.epoch == 2 or (name, epoch.epoch) == ("baseline", 4):
            raise Killed

    options: dict[str, Any] = {"spec": SPEC, "ema_decay": 0.99, "baseline": True}
    whole = finetune(rank_map, tmp_path / "whole.json", **options)
    tracking = TrackingSpec(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    for _ in range(3):
        with pytest.raises(Killed):
            finetune(rank_map, tmp_path / "parts.json", **options, tracking=tracking, watch=interrupt)
    parts = finetune(rank_map, tmp_path / "parts.json", **options, tracking=tracking, watch=interrupt)
    assert same(weights_of(whole), weights_of(parts))
    assert same(load_file(whole.files[2]), load_file(parts.files[2]))
    assert whole.curves == parts.curves

    client = MlflowClient(tracking_uri=tracking.uri)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    for key, name in (("accuracy", "compressed"), ("baseline_loss", "baseline")):
        history = client.get_metric_history(runs[0].info.run_id, key)
        points = {metric.step: metric.value for metric in history}
        assert len(history) == len(points) == 6
        assert points[3] == getattr(parts.curves[name][2], key.removeprefix("baseline_"))
    assert runs[0].data.metrics["final_after_accuracy"] == parts.scores["after"].accuracy
    assert runs[0].data.params["learning_rate"] == "0.05"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_moments_change_no_bit(rank_map: Path, tmp_path: Path, storage: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.killed", "sklearn.datasets"])
    started, spec = tmp_path / "started", SPEC.model_copy(update={"epochs": EPOCHS})

    def begin(output: Path) -> Any:
        started.unlink(missing_ok=True)
        child = processes.Process(target=fine_tune_in_child, args=(rank_map, output, spec, storage, started))
        child.start()
        while not started.exists() and child.is_alive():
            time.sleep(0.005)
        return child

    def finish(output: Path) -> float:
        """Seconds of its own work: the machine may have been busy with another's."""
        child = begin(output)
        child.join(300)
        assert child.exitcode == 0
        return float(started.read_text())

    seconds = finish(tmp_path / "whole.json")
    moments, output = random.Random(0), tmp_path / "parts.json"
    for _ in range(10):
        child = begin(output)
        # One epoch in the mean, so that ten kills come before the end even where they meet a faster machine.
        time.sleep(moments.uniform(0, 2 * seconds / EPOCHS))
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, "it had ended before it was killed"
    finish(output)
    assert same(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors"))


def _retraining(
    tmp_path: Path,
    *,
    ema: float = 0.5,
    spec: FineTuneSpec = SPEC,
    dtype: Any = torch.float32,
    of: DataSpec = DATA,
    teacher: nn.Module | None = None,
) -> Any:
    model = build_model(ModelSpec(name="digits-cnn"), weights=None)
    dense = teacher or build_model(ModelSpec(name="digits-cnn"), weights=None)
    data = load_data(of, cache=tmp_path, seed=0)
    schedule = Schedule(spec=spec, dtype=dtype, ema_decay=ema, seed=0, threads=1, batch_images=100)
    return Retraining(model, dense, data, schedule, chains={}, checkpoint=tmp_path / "checkpoint.pt")


class Dropping(nn.Sequential):
    """A network that draws numbers in training."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
        super().__init__(*layers)
        self.eval()


def test_what_layers_draw_is_the_trainings_own_through_an_interruption(tmp_path: Path) -> None:
    data = load_data(DATA, cache=tmp_path, seed=0)
    spec = FineTuneSpec(epochs=3, batch_images=64, learning_rate=0.05, **SGD)
    schedule = Schedule(spec=spec, dtype=torch.float32, ema_decay=0.5, seed=0, threads=1, batch_images=100)

    def training(name: str) -> Retraining:
        return Retraining(Dropping(), Dropping(), data, schedule, chains={}, checkpoint=tmp_path / name)

    def interrupt(curve: list[Any]) -> None:
        if len(curve) == 2:
            raise Killed

    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = training("whole")
    whole.run()
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was drawn from"
    with pytest.raises(Killed):
        training("parts").run(watch=interrupt)
    torch.manual_seed(2)
    parts = training("parts")
    parts.run()
    assert same(whole.model.state_dict(), parts.model.state_dict())
    assert whole.curve == parts.curve
    still = Dropping()
    still[3] = nn.Identity()
    other = Retraining(still, Dropping(), data, schedule, chains={}, checkpoint=tmp_path / "still")
    other.run()
    assert other.curve != whole.curve, "nothing was dropped"


def test_the_average_is_that_of_all_steps(tmp_path: Path) -> None:
    spec = FineTuneSpec(steps=7, batch_images=32, learning_rate=0.05, **SGD)
    training = _retraining(tmp_path, ema=0.4, spec=spec)
    model, key = training.model, "stem.weight"
    seen = [model.state_dict()[key].clone().double().numpy()]
    training.run(progress=lambda done, total: seen.append(model.state_dict()[key].clone().double().numpy()))
    kept = [min(0.4, (1 + step) / (10 + step)) for step in range(1, 8)]
    shares = [np.prod(kept)] + [(1 - k) * np.prod(kept[i + 1 :]) for i, k in enumerate(kept)]
    assert sum(shares) == pytest.approx(1)
    expected = np.tensordot(shares, seen, 1)
    np.testing.assert_allclose(training.average.state_dict()[key].numpy(), expected, rtol=1e-5, atol=1e-7)
    assert len(seen) == 8
    assert training.curve[-1].steps == 7


def test_epochs_are_those_asked_for_where_batches_leave_a_remainder(tmp_path: Path) -> None:
    training = _retraining(tmp_path, spec=FineTuneSpec(epochs=3, batch_images=60, learning_rate=0.01))
    training.run()
    assert [(one.epoch, one.steps) for one in training.curve] == [(n, 5 * n) for n in (1, 2, 3)]


def test_mixed_precision_trains_float32_weights(tmp_path: Path) -> None:
    training = _retraining(tmp_path, spec=FineTuneSpec(steps=3, batch_images=16), dtype=torch.bfloat16)
    before = training.model.state_dict()["stem.weight"].clone()
    training.run()
    after = training.model.state_dict()["stem.weight"]
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)
    assert np.isfinite(training.curve[-1].loss)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    spec = FineTuneSpec(steps=2, batch_images=16)
    _retraining(tmp_path, spec=spec).run()
    assert _retraining(tmp_path, spec=spec).training.steps == 2
    other = build_model(ModelSpec(name="digits-cnn"), weights=None)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    different: list[dict[str, Any]] = [
        {"spec": FineTuneSpec(steps=3, batch_images=16)},
        {"teacher": other},
        {"of": DATA.model_copy(update={"mean": [0.25]})},
        {"of": DATA.model_copy(update={"std": [0.5]})},
        {"of": DATA.model_copy(update={"augment": AugmentSpec(flip=True)})},
    ]
    for given in different:
        with pytest.raises(ModelError, match="its own checkpoint only"):
            _retraining(tmp_path, **{"spec": spec, **given})
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        _retraining(tmp_path)


def test_mistakes_are_told(rank_map: Path, tmp_path: Path) -> None:
    with pytest.raises(RankMapError, match=r"a \.json file"):
        finetune(rank_map, tmp_path / "tuned.safetensors", spec=SPEC)
    with pytest.raises(RankMapError, match="must not replace"):
        finetune(rank_map, rank_map, spec=SPEC)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="found none"):
            finetune(rank_map, tmp_path / "tuned.json", spec=SPEC, device="cuda")


def test_the_command_shows_all_networks(rank_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "tuned.json")
    command = ["finetune", str(rank_map), "-o", output, "--epochs", "1", "--batch-images", "64", "--no-tracking"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--baseline", "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code in (0, None), err
    found = json.loads(out)
    assert set(found["scores"]) == {"dense", "before", "after", "baseline"}
    assert [epoch["steps"] for epoch in found["curves"]["baseline"]] == [5]
    assert "compressed epoch 1: loss" in err
    with pytest.raises(SystemExit) as ended:
        main([*command, "--learning-rate", "-1"])
    assert ended.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err
