"""Rank maps as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranksearch.conv import Conv
from ranksearch.errors import RankMapError
from ranksearch.rankmap import LayerRanks, ModelRecord, RankMap, WeightsRecord
from ranksearch.recorded import provenance_of

CONV = Conv(in_channels=4, out_channels=6, kernel=(3, 5), stride=(2, 1), padding=(1, 2), size=(9, 8), bias=False)


def some_map() -> RankMap:
    layer = LayerRanks(format="tucker2", ranks=(2, 3), conv=CONV.to_json(), macs=10, params=20)
    return RankMap(
        model=ModelRecord(name="net", options={"num_classes": 3}, input_shape=(3, 9, 8), weights_sha256="ab"),
        layers={"body.conv": layer},
        macs=30,
        params=40,
        dense_macs=60,
        dense_params=80,
        metrics={"accuracy": 0.875, "trial": 3, "latency_ms": None},
        weights=WeightsRecord(file="compressed.safetensors", sha256="cd"),
        provenance={"study": "one", "seed": 7, "data": {"root": None, "train": ["a"]}},
    )


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = some_map().save(tmp_path / "rank_map.json")
    found = RankMap.load(path)
    assert found == some_map()
    assert found.layers["body.conv"].geometry == CONV
    assert found.macs_ratio == 0.5
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    written = json.loads(path.read_text())
    assert (written["schema_name"], written["version"]) == ("ranksearch/rank-map", 1)


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RankMapError, match="cannot write the rank map"):
        some_map().save(tmp_path / "folder")
    with pytest.raises(RankMapError, match="cannot write the rank map"):
        some_map().save(tmp_path / "missing" / "rank_map.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_writing_over_a_map_replaces_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank_map.json"
    path.write_text("x" * 100_000)
    some_map().save(path)
    assert RankMap.load(path) == some_map()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"version": 2}, r"\$.version"),
        ({"schema_name": "another"}, r"\$.schema_name"),
        ({"extra": 1}, r"\$.extra"),
        ({"macs": "many"}, r"\$.macs"),
        ({"dense_macs": 0}, r"\$.dense_macs"),
        ({"model": {"name": "net", "input_shape": [3, 9]}}, r"\$.model.input_shape"),
        ({"layers": {"conv": {"format": "svd"}}}, r"\$.layers.conv.ranks"),
    ],
)
def test_a_map_of_another_kind_is_refused_with_the_place(tmp_path: Path, change: dict[str, object], place: str) -> None:
    path = tmp_path / "rank_map.json"
    path.write_text(json.dumps({**some_map().model_dump(mode="json"), **change}))
    with pytest.raises(RankMapError, match=f"rank_map.json is not a rank map of version 1: at {place}"):
        RankMap.load(path)


@pytest.mark.parametrize(
    "geometry",
    [
        {"in_channels": 0},
        {"kernel": [3]},
        {"kernel": 3},
        {"stride": [1, 1.5]},
        {"groups": 5},
        {"padding": [-1, 0]},
        {"padding_mode": "mirror"},
        {"colour": "red"},
        {"size": None},
        {"out_channels": "6"},
    ],
)
def test_impossible_geometry_is_refused(geometry: dict[str, object]) -> None:
    data = some_map().model_dump(mode="json")
    data["layers"]["body.conv"]["conv"] |= geometry
    with pytest.raises(RankMapError, match="impossible geometry"):
        RankMap.parse(json.dumps(data))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary.json"):
        with pytest.raises(RankMapError, match="cannot read the rank map"):
            RankMap.load(path)


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("batch_images", 0, 1),
        ("batch_images", 2.5, 1),
        ("cpus_per_trial", 0, 1),
        ("seed", float("inf"), 0),
        ("seed", 0.5, 0),
        ("seed", True, 0),
        ("gpus_per_trial", float("nan"), 0),
        ("gpus_per_trial", "one", 0),
    ],
)
def test_what_a_map_records_of_its_search_must_make_sense(key: str, value: object, least: int) -> None:
    made = some_map()
    kept = {"batch_images": 64, "cpus_per_trial": 2, "seed": 7, "gpus_per_trial": 0.5}
    for name, good in kept.items():
        assert provenance_of(made.model_copy(update={"provenance": kept}), name) == good
    with pytest.raises(RankMapError, match=rf"provenance\.{key} .* number from {least} on, found {value!r}.*Export"):
        provenance_of(made.model_copy(update={"provenance": kept | {key: value}}), key)
