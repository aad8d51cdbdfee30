"""From a space to its network and data: where files are looked for, and what a user's own network must be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ranksearch.data import load_data
from ranksearch.errors import DataError, ModelError
from ranksearch.location import located, located_data
from ranksearch.preparation import check_classes, read_network
from ranksearch.space import DataSpec, Space

FACTORIES = """
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, images):
        return {"logits": self.layers(images)}
"""
NPZ = {"source": "npz", "train": ["train.npz"], "validation": ["val.npz"], "mean": [0.5], "std": [0.25]}


def write_images(folder: Path) -> Path:
    """Twelve training and ten validation images as .npz files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", 12), ("val", 10))):
        images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 10)
    return folder


def own_network(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Space:
    """The space of a user's own network on the digits."""
    (folder / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return Space.model_validate({"model": {"name": f"{name}:Detector"}, "layers": {"include": ["layers.*"]}})


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the home folder is ``home`` beside it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_tilde_is_the_home_folder(elsewhere: Path, tmp_path: Path) -> None:
    cifar = write_images(tmp_path / "home" / "cifar")
    (tmp_path / "home" / "maps").mkdir()
    sections: dict[str, Any] = {
        "model": {"name": "package.module:function"},
        "data": {**NPZ, "root": "~/cifar"},
        "strategy": {"seed_maps": ["~/maps/one.json"]},
    }
    space = located(Space.model_validate(sections), tmp_path / "spaces")
    assert space.data.root == str(cifar)
    assert space.strategy.seed_maps == [str(tmp_path / "home" / "maps" / "one.json")]


@pytest.mark.parametrize("root", [None, "."])
def test_files_without_a_root_are_found_again_from_any_folder(
    root: str | None, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = write_images(tmp_path / "spaces")
    spec = DataSpec.model_validate({**NPZ, "root": root})
    assert located_data(spec, beside).root == str(beside), "the space file's folder, as the working directory has none"
    write_images(elsewhere)
    found = located_data(spec, beside)
    assert found.root == str(elsewhere), "the working directory first"
    monkeypatch.chdir("/")
    assert len(load_data(found, cache=tmp_path / "cache", seed=0).train) == 12


def test_an_image_folder_without_a_root_is_beside_the_space_file(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "spaces" / "train").mkdir(parents=True)
    assert located_data(DataSpec(source="folder"), tmp_path / "spaces").root == str(tmp_path / "spaces")


def test_data_that_are_nowhere_are_named_in_the_working_directory(elsewhere: Path, tmp_path: Path) -> None:
    assert located_data(DataSpec.model_validate({**NPZ, "root": "no"}), tmp_path).root == str(elsewhere / "no")
    assert located_data(DataSpec(), tmp_path).root is None, "embedded data have no root"


class Returning(nn.Module):
    """A network that returns what it is told to make of its logits."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.make = make

    def forward(self, images: Tensor) -> Any:
        return self.make(self.linear(images.flatten(1)))


@pytest.mark.parametrize(("make", "kind"), [(lambda x: (x, x), "tuple"), (lambda x: {"out": x}, "dict")])
def test_a_network_that_returns_no_tensor_is_refused(make: Any, kind: str, tmp_path: Path) -> None:
    data = load_data(DataSpec(), cache=tmp_path, seed=0)
    check_classes(Returning(torch.clone), data)
    with pytest.raises(ModelError, match=f"one tensor of logits .*found {kind}.*Wrap it"):
        check_classes(Returning(make), data)
    with pytest.raises(DataError, match="10 classes for outputs of shape"):
        check_classes(Returning(lambda x: x[:, :9]), data)


def test_a_users_network_that_returns_no_tensor_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = own_network(tmp_path, monkeypatch, "own_detector")
    with pytest.raises(ModelError, match="found dict"):
        read_network(space, tmp_path / "cache")


@pytest.mark.parametrize("name", ["resnet21", "nowhere.at_all:network"])
def test_a_wrong_network_is_told_before_the_images_are_read(name: str, tmp_path: Path) -> None:
    told = []
    space = Space.model_validate({"model": {"name": name}, "data": {**NPZ, "root": str(tmp_path / "no")}})
    with pytest.raises(ModelError, match=name.partition(":")[0]):
        read_network(space, tmp_path / "cache", lambda *what: told.append(what))
    assert told == []
