"""A real pretrained network on real images: what compression without training must reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.export import choose, load_compressed, read_compressed
from ranksearch.handover import compare, export_trial
from ranksearch.launch import search
from ranksearch.models import build_model
from ranksearch.space import ModelSpec
from ranksearch.storage import Store
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_half_the_macs_without_training(
    real_data: Path, tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_DATA", str(real_data))
    settings = ["strategy.name=energy", "budget.trials=6", "resources.engine=local", "tracking.enabled=false"]
    study = search(REPOSITORY / "search_spaces" / "resnet20-cifar10.yaml", settings=settings)
    assert study.setting.dense["macs"] == 40_551_040  # by hand, from the paper's table of the architecture
    dense = (study.setting.dense["accuracy"] + study.setting.dense["accuracy_search"]) / 2
    assert dense == pytest.approx(0.9162, abs=0.001)  # both halves of the 5,000 validation images

    best = choose(study, max_macs_ratio=0.5)
    front = study.front().set_index("trial")
    assert front.loc[best.number, "macs_ratio"] <= 0.5
    assert front.loc[best.number, "accuracy"] >= 0.84

    export_trial(study, best, Store(), tmp_path / "map.json", weights=tmp_path / "compressed.safetensors")
    compared = compare(tmp_path / "map.json")
    assert compared.compressed.accuracy == front.loc[best.number, "accuracy"]
    rank_map, weights = read_compressed(tmp_path / "compressed.safetensors")
    assert weights is not None
    network = load_compressed(rank_map, build_model(ModelSpec(name="resnet20"), weights=None), weights)
    counter = FlopCounterMode(display=False)
    with counter:
        network(next(network.parameters()).new_zeros((1, 3, 32, 32)))
    assert counter.get_total_flops() == 2 * front.loc[best.number, "macs"] == 2 * compared.compressed.macs
