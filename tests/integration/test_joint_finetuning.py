"""Fine-tuning by several workers: the training of one, split; a kill of any process changes no bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from ranksearch.engine.cluster import cluster as connection
from ranksearch.engine.cluster import quiet
from ranksearch.engine.train import crew
from ranksearch.errors import EngineError, ModelError
from ranksearch.finetuning import FineTuned, Workers, finetune
from ranksearch.models import build_model
from ranksearch.space import AugmentSpec, DataSpec, FineTuneSpec, ModelSpec, ResourcesSpec
from tests.conftest import REPOSITORY
from tests.maps import rank_map_for
from tests.services import ray_cluster

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]
DATA = DataSpec(
    train_images=320,
    calibration_images=64,
    search_images=100,
    report_images=200,
    mean=[0.3],
    std=[0.4],
    augment=AugmentSpec(flip=True, crop_px=1),
)
SGD: dict[str, Any] = {"optimiser": "sgd", "batch_norm": "batch", "learning_rate": 0.05, "distill": 0.2}
PATIENCE_SECONDS = 300.0


@pytest.fixture
def rank_map(tmp_path: Path) -> Path:
    """A map of the digits network, untrained; its tensor chain has a gauge of its own."""
    dense = build_model(ModelSpec(name="digits-cnn"), weights=None)
    weights = tmp_path / "dense.safetensors"
    save_file(dense.state_dict(), weights)
    ranks: dict[str, tuple[str, tuple[int, ...]]] = {
        "block1.conv1": ("tucker2", (16, 16)),
        "block2.conv2": ("tensor-chain", (2, 8, 8)),
        "block3.conv1": ("cp", (40,)),
    }
    made = rank_map_for("digits-cnn", dense, (1, 8, 8), ranks, provenance={"data": DATA.model_dump(mode="json")})
    file = tmp_path / "map.json"
    made.model_copy(update={"model": made.model.model_copy(update={"weights": str(weights)})}).save(file)
    return file


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of three CPUs."""
    with ray_cluster(3) as address:
        yield address


def weights_of(found: FineTuned) -> dict[str, torch.Tensor]:
    return load_file(found.files[1])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_two_workers_train_as_one_does(rank_map: Path, tmp_path: Path, cluster: str) -> None:
    """Batches of 31 images are split into 15 and 16; frozen batch norms see the same whatever the share."""
    spec = FineTuneSpec(epochs=2, batch_images=31, **{**SGD, "batch_norm": "frozen", "learning_rate": 0.01})
    one = finetune(rank_map, tmp_path / "one.json", spec=spec, ema_decay=0.9, threads=1)
    said: list[str] = []
    two = finetune(
        rank_map,
        tmp_path / "two.json",
        spec=spec,
        ema_decay=0.9,
        workers=Workers(count=2, address=cluster),
        notify=lambda what, done, total: said.append(what),
    )
    assert said.index("waiting for the workers") < said.index("fine-tuning the compressed network")
    for ours, theirs in zip(two.curves["compressed"], one.curves["compressed"], strict=True):
        assert (ours.epoch, ours.steps) == (theirs.epoch, theirs.steps)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.loss_search == pytest.approx(theirs.loss_search, rel=1e-3)
        assert ours.loss_search_ema == pytest.approx(theirs.loss_search_ema, rel=1e-3)
    known = weights_of(one)
    for key, value in weights_of(two).items():
        torch.testing.assert_close(value, known[key], rtol=1e-2, atol=1e-3)
    assert not same(weights_of(two), known), "they add up in another order"


class Killed(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_training_of_three_workers_ends_in_the_same_bits(
    rank_map: Path, tmp_path: Path, cluster: str
) -> None:
    def interrupt(name: str, epoch: Any) -> None:
        if (name, epoch.epoch) in (("compressed", 2), ("baseline", 1)):
            raise Killed

    options: dict[str, Any] = {
        "spec": FineTuneSpec(epochs=3, batch_images=32, **SGD),
        "ema_decay": 0.9,
        "baseline": True,
        "workers": Workers(count=3, address=cluster),
    }
    whole = finetune(rank_map, tmp_path / "whole.json", **options)
    for _ in range(2):
        with pytest.raises(Killed):
            finetune(rank_map, tmp_path / "parts.json", **options, watch=interrupt)
    with pytest.raises(ModelError, match="its own checkpoint only"):
        finetune(rank_map, tmp_path / "parts.json", **{**options, "workers": Workers(count=2, address=cluster)})
    parts = finetune(rank_map, tmp_path / "parts.json", **options)
    assert whole.curves == parts.curves
    assert same(weights_of(whole), weights_of(parts))
    assert same(load_file(whole.files[2]), load_file(parts.files[2]))
    assert whole.curves["compressed"][-1].loss < 0.9 * whole.curves["compressed"][0].loss
    assert whole.rank_map.provenance["finetune"]["workers"] == 3


class Command:
    """``ranksearch finetune`` in a process group of its own, known by its home folder."""

    def __init__(self, rank_map: Path, output: str, folder: Path, epochs: int) -> None:
        self.folder, self.log = folder, folder / f"{output}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        options = ["--epochs", str(epochs), "--batch-images", "32", "--learning-rate", "0.05", "--workers", "2"]
        options += ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ranksearch", "finetune", str(rank_map), "-o", f"{output}.json", *options],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while line not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def ended(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def family(self) -> dict[int, str]:
        """Processes that it started and that still run, as they call themselves."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"HOME={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found


def _gone(command: Command) -> bool:
    """Whether nothing of it is left after a while."""
    deadline = time.monotonic() + 120
    while command.family() and time.monotonic() < deadline:
        time.sleep(0.5)
    return not command.family()


@pytest.mark.slow
def test_kills_of_a_worker_and_of_the_driver_change_no_bit(rank_map: Path, tmp_path: Path) -> None:
    epochs = 40
    whole = Command(rank_map, "whole", tmp_path, epochs)
    assert whole.ended() == 0, whole.log.read_text()

    parts = Command(rank_map, "parts", tmp_path, epochs)
    parts.wait_for("compressed epoch 2:")
    workers = [pid for pid, name in parts.family().items() if "RayTrainWorker" in name]
    assert len(workers) == 2, parts.family()
    os.kill(workers[1], signal.SIGKILL)
    seen = parts.log.read_text().count("epoch")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while parts.log.read_text().count("epoch") < seen + 10:
        assert parts.process.poll() is None, parts.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parts.process.kill()
    assert parts.ended() == -signal.SIGKILL, "it had ended before it was killed"
    assert _gone(parts), parts.family()
    again = Command(rank_map, "parts", tmp_path, epochs)
    assert again.ended() == 0, again.log.read_text()
    assert "epoch 1:" not in again.log.read_text(), "it began anew"
    assert same(load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors"))

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(metric.step for metric in history) == list(range(1, epochs + 1))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(rank_map: Path, tmp_path: Path) -> None:
    command = Command(rank_map, "stopped", tmp_path, 10_000)
    command.wait_for("compressed epoch 3:")
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.ended() == 130, command.log.read_text()
    assert "Traceback" not in command.log.read_text()
    assert not command.family()


TRAINING = ("PlacementGroupCleaner", "RayTrainWorker", "TrainController", "_Foreman", "_fit")
"""What Ray calls the processes of a joint training by; other tests on this machine have none."""


def _of_a_training() -> dict[int, str]:
    """Processes on this machine that belong to a joint training, as Ray calls them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        if name.startswith("ray::") and any(part in name for part in TRAINING):
            found[int(entry.name)] = name
    return found


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


@pytest.mark.slow
def test_an_interruption_gives_back_what_the_workers_had(cluster: str) -> None:
    def work(member: Any) -> None:
        while True:
            if member.place == 0:
                member.keep(b"state")
            else:
                time.sleep(0.01)

    def hear(message: Any) -> None:
        raise Killed

    before = _of_a_training()
    for _ in range(2):
        with crew(ResourcesSpec(workers=3, address=cluster)) as run, pytest.raises(Killed):
            run(work, hear)
    deadline = time.monotonic() + 60
    with quiet(cluster), connection(ResourcesSpec(workers=3, address=cluster)):
        while _free_cpus() != 3 or _of_a_training().keys() - before.keys():
            assert time.monotonic() < deadline, (_free_cpus(), before, _of_a_training())
            time.sleep(0.5)


@pytest.mark.slow
def test_what_the_workers_meet_reaches_the_caller(rank_map: Path, tmp_path: Path, cluster: str) -> None:
    two = Workers(count=2, address=cluster)
    spec = FineTuneSpec(epochs=1, batch_images=32, **{**SGD, "learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match="diverged"):
        finetune(rank_map, tmp_path / "tuned.json", spec=spec, workers=two)
    few = FineTuneSpec(epochs=1, batch_images=1, **SGD)
    with pytest.raises(ModelError, match=r"batches of 1 images for 2 workers\. Give fewer --workers"):
        finetune(rank_map, tmp_path / "tuned.json", spec=few, workers=two)
    with pytest.raises(EngineError, match=r"has 3 CPUs .* found --workers 4, 3 fit at once\. Give --workers 3"):
        finetune(rank_map, tmp_path / "tuned.json", spec=spec, workers=Workers(count=4, address=cluster))


def test_workers_that_cannot_be_had_are_told_before_ray_is_started(rank_map: Path, tmp_path: Path) -> None:
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    spec = FineTuneSpec(epochs=1, batch_images=10_000, **SGD)
    with pytest.raises(EngineError, match=rf"found --workers {cpus + 1}, {cpus} fit at once\. Give --workers {cpus}"):
        finetune(rank_map, tmp_path / "tuned.json", spec=spec, workers=Workers(count=cpus + 1))
    with pytest.raises(EngineError, match="Lower --threads"):
        finetune(rank_map, tmp_path / "tuned.json", spec=spec, threads=2 * cpus, workers=Workers(count=1))
    with pytest.raises(
        EngineError, match=r"cannot reach Ray at '127\.0\.0\.1:1': ConnectionRefusedError.* Check the address"
    ):
        finetune(rank_map, tmp_path / "tuned.json", spec=spec, workers=Workers(count=1, address="127.0.0.1:1"))
    if not gpus:
        with pytest.raises(EngineError, match=r"none fits\. Leave out --gpus-per-worker"):
            finetune(rank_map, tmp_path / "tuned.json", spec=spec, workers=Workers(count=1, gpus=1))
