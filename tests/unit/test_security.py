"""Data from elsewhere runs nothing, reads nothing outside of its folder, and servers listen to this machine alone."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranksearch.config import load_space, parse_space
from ranksearch.data.arrays import read_npz
from ranksearch.errors import DataError, ModelError, RankMapError, SpaceError
from ranksearch.export import read_compressed
from ranksearch.handover import compare, compress
from ranksearch.models import build_model
from ranksearch.rankmap import ModelRecord, RankMap, WeightsRecord
from ranksearch.space import DataSpec, ModelSpec, TrackingSpec
from ranksearch.tracking.store import ui_command


class Touching:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._file),)


def test_weights_with_a_program_in_them_run_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pt"
    torch.save({"conv1.weight": Touching(mark)}, file)
    with pytest.raises(ModelError, match="cannot read the weights"):
        build_model(ModelSpec(name="resnet20"), weights=file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Touching(mark)))
    assert mark.exists(), "the program would have run"


def test_images_with_a_program_in_them_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    images = np.empty(1, dtype=object)
    images[0] = Touching(mark)
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(1, np.int64))
    with pytest.raises(DataError):
        read_npz(DataSpec(source="npz", root=str(tmp_path), train=["a.npz"], validation=["a.npz"]))
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir", "python/name:os.mkdir"])
def test_space_files_make_no_objects(tag: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "space.yaml", tmp_path / "mark"
    file.write_text(f"model: !!{tag} ['{mark}']\n", encoding="utf-8")
    with pytest.raises(SpaceError, match="must be valid YAML"):
        load_space(file)
    assert not mark.exists()


def test_reading_a_space_imports_no_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_marking.py").write_text("import os; os.mkdir('mark')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    parse_space({"model": {"name": "own_marking:net"}, "data": {"source": "own_marking:data"}})
    assert not (tmp_path / "mark").exists()


def rank_map(**changes: Any) -> RankMap:
    model = ModelRecord(name="resnet20", input_shape=(3, 32, 32))
    return RankMap(model=model, layers={}, macs=1, params=1, dense_macs=1, dense_params=1, **changes)


def test_a_rank_map_calls_no_function_that_only_it_names(tmp_path: Path) -> None:
    mark, file, output = tmp_path / "mark", tmp_path / "map.json", tmp_path / "out.safetensors"
    strange = ModelRecord(name="os:mkdir", options={"path": str(mark)}, input_shape=(1, 8, 8))
    digits = {"data": {"source": "digits"}}
    rank_map(provenance=digits).model_copy(update={"model": strange}).save(file)
    other = tmp_path / "other.yaml"
    other.write_text("model: {name: 'os:mkdir', options: {path: elsewhere}}\n", encoding="utf-8")
    for attempt in (
        lambda: compare(file),
        lambda: compress(file, output),
        lambda: compare(file, data=str(other)),
    ):
        with pytest.raises(RankMapError, match=r"called only where you name it too, the map names os:mkdir.*--trust"):
            attempt()
    source = {"data": {"source": "os:mkdir", "options": {"path": str(mark)}}}
    rank_map(provenance=source).save(file)
    with pytest.raises(RankMapError, match="the map names os:mkdir"):
        compare(file)
    assert not mark.exists()
    with pytest.raises(DataError):  # it returns no data; but it is called
        compare(file, trust=True)
    assert mark.exists()


@pytest.mark.parametrize("name", ["../weights.safetensors", "a/../../weights.safetensors"])
def test_the_weights_of_a_rank_map_lie_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "maps" / "a").mkdir(parents=True)
    file = tmp_path / "maps" / "map.json"
    rank_map(weights=WeightsRecord(file=name, sha256="0" * 64)).save(file)
    with pytest.raises(RankMapError, match="must lie in its folder"):
        read_compressed(file)


def test_the_weights_of_a_rank_map_are_a_file_not_a_device(tmp_path: Path) -> None:
    rank_map(weights=WeightsRecord(file="/dev/zero", sha256="0" * 64)).save(tmp_path / "map.json")
    with pytest.raises(RankMapError, match="must exist"):
        read_compressed(tmp_path / "map.json")


def test_the_user_interface_listens_to_this_machine(tmp_path: Path) -> None:
    command, _ = ui_command(TrackingSpec(), folder=tmp_path)
    assert command[command.index("--host") + 1] == "127.0.0.1"
