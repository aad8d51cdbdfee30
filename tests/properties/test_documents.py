"""Whatever a file holds, reading it gives a valid object or an error of ours."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ranksearch.config import load_space, parse_space
from ranksearch.errors import RankMapError, SpaceError
from ranksearch.rankmap import RankMap
from ranksearch.space import Space

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(sorted({*Space.model_fields, "name", "ranks", "format", "trials", "ratios", "steps", "${X}"}))
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
documents = st.dictionaries(words | st.text(max_size=4), values, max_size=5)
yaml_text = st.text(
    alphabet=st.sampled_from("abmodel: name\n-[]{}#&*!|>'\"%@`?,0123456789.eE+~<=\t_x") | st.characters(), max_size=60
)
tags = st.sampled_from(
    [
        "int",
        "float",
        "bool",
        "null",
        "timestamp",
        "binary",
        "set",
        "omap",
        "pairs",
        "str",
        "seq",
        "map",
        "merge",
        "value",
    ]
)


def read(folder: Path, text: str) -> None:
    path = folder / "space.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(SpaceError):
        assert isinstance(load_space(path), Space)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@given(text=yaml_text)
@example(text="model: {name: a, options: {? !!set {a, b}: 1}}")
@example(text="a: &x [*x]")
@example(text='"\\ud800": 1\nmodel: {name: "\\ud800"}')
@settings(max_examples=200)
def test_any_text_is_a_space_or_a_problem(folder: Path, text: str) -> None:
    read(folder, text)


@given(tag=tags, value=st.text("0123456789abcdef.:-+_~ []{}'", max_size=12))
def test_any_tag_on_any_value_is_a_space_or_a_problem(folder: Path, tag: str, value: str) -> None:
    read(folder, f"model: {{name: a}}\nseed: !!{tag} {value}\n")


@given(data=documents)
@settings(max_examples=200)
def test_any_mapping_is_a_space_or_problems(data: dict[str, object]) -> None:
    for whole in (data, {"model": {"name": "resnet20"}, **data}):
        with contextlib.suppress(SpaceError):
            space = parse_space(whole)
            assert parse_space(space.model_dump(mode="json")) == space


@given(key=st.text(max_size=12), value=st.text(max_size=12))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_setting_changes_the_space_or_is_a_problem(folder: Path, key: str, value: str) -> None:
    path = folder / "plain.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "resnet20"}}), encoding="utf-8")
    for setting in (f"{key}={value}", f"budget.trials={value}", f"model.{key}={value}", key):
        with contextlib.suppress(SpaceError):
            load_space(path, [setting])


GEOMETRY = {"in_channels": 4, "out_channels": 6, "kernel": [3, 3], "padding": [1, 1], "size": [8, 8]}
CONVOLUTION = {"format": "tucker2", "ranks": [2, 3], "conv": GEOMETRY, "macs": 10, "params": 10}
DOCUMENT = {
    "model": {"name": "net", "input_shape": [3, 8, 8]},
    "layers": {"conv": CONVOLUTION},
    "macs": 10,
    "params": 10,
    "dense_macs": 100,
    "dense_params": 100,
}


@given(text=st.text() | values.map(json.dumps))
@example(text="\ud800")
@example(text="[" * 5000)
def test_any_text_is_a_rank_map_or_an_error(text: str) -> None:
    with contextlib.suppress(RankMapError):
        RankMap.parse(text)


@given(
    geometry=st.fixed_dictionaries(
        {}, optional=dict.fromkeys((*GEOMETRY, "stride", "dilation", "groups", "bias", "padding_mode", "x"), values)
    )
)
@example(geometry={"in_channels": float("nan"), "groups": 0})
@example(geometry={"kernel": []})
def test_any_geometry_is_a_convolution_or_an_error(geometry: dict[str, object]) -> None:
    layer = {**CONVOLUTION, "conv": {**GEOMETRY, **geometry}}
    with contextlib.suppress(RankMapError):
        conv = RankMap.parse(json.dumps({**DOCUMENT, "layers": {"conv": layer}})).layers["conv"].geometry
        assert conv.macs + conv.params >= 0 or min(conv.output_size) < 1


@given(
    place=st.sampled_from(sorted(DOCUMENT)), value=values, metrics=st.dictionaries(st.text(), st.floats(), max_size=3)
)
def test_any_value_anywhere_is_a_rank_map_or_an_error(place: str, value: object, metrics: dict[str, float]) -> None:
    with contextlib.suppress(RankMapError):
        rank_map = RankMap.parse(json.dumps({**DOCUMENT, "metrics": metrics, place: value}))
        assert rank_map.macs_ratio >= 0
