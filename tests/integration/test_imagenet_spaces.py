"""The shipped ImageNet spaces, each run for two trials on a small synthetic image folder with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.config import load_space
from ranksearch.export import load_compressed, rank_map_of
from ranksearch.launch import search
from ranksearch.models import build_model
from ranksearch.space import ModelSpec
from tests.conftest import REPOSITORY
from tests.images import make_image_folder

CASES = [
    ("resnet18-imagenet", 64, 11_689_512),
    ("resnet50-imagenet", 64, 25_557_032),
    ("vgg16-imagenet", 32, 138_357_544),
]
"""Space, image size of the run, and the published number of parameters."""


def counted(model: torch.nn.Module, size_px: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size_px, size_px))
    return counter.get_total_flops() // 2


def some_layers(model: torch.nn.Module) -> list[str]:
    """The first few convolutions after the stem: the whole network would take minutes to decompose."""
    convs = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    return convs[1:6]


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("name", "size_px", "params"), CASES)
def test_two_trials(name: str, size_px: int, params: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_image_folder(tmp_path / "images", classes=3, images_per_class=10, size_px=(size_px + 8, size_px + 20))
    monkeypatch.setenv("IMAGENET", str(images))
    file = REPOSITORY / "search_spaces" / f"{name}.yaml"
    own = load_space(file)
    dense = build_model(ModelSpec(name=own.model.name), weights=None)
    save_file(dense.state_dict(), images / "random.safetensors")
    study = search(
        file,
        settings=[
            "model.weights=random.safetensors",
            "data.train_images=16",
            "data.calibration_images=8",
            "data.search_images=6",
            "data.report_images=6",
            f"data.image_size_px={size_px}",
            f"layers.include=[{', '.join(some_layers(dense))}]",
            "ranks.ratios=[0.25, 0.5, 1.0]",
            "budget.trials=2",
            "evaluation.refit_images=8",
            "evaluation.select_images=4",
            "evaluation.fine_tune.steps=1",
            "evaluation.fine_tune.batch_images=4",
            "resources.engine=local",
            "resources.gpus_per_trial=0",
            "resources.cpus_per_trial=1",
            "tracking.enabled=false",
        ],
    )
    trials = study.trials()
    assert [(t.state, t.reason) for t in trials] == [("COMPLETE", None)] * 2
    assert study.setting.dense["params"] == params
    assert study.setting.dense["macs"] == counted(dense, size_px)
    front = study.front_trials()
    assert front
    for trial in front:
        assert trial.outcome is not None
        assert trial.outcome.weights is not None
        model = load_compressed(rank_map_of(study, trial), dense, study.weights_folder / trial.outcome.weights)
        assert counted(model, size_px) == trial.outcome.macs < study.setting.dense["macs"]
        assert sum(p.numel() for p in model.parameters()) == trial.outcome.params
