"""Whatever a study's journal holds, reading it gives trials or an error of ours."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranksearch.errors import RanksearchError
from ranksearch.storage import Store
from ranksearch.trial import Outcome, Proposal
from tests.studies import setting_of, space_of
from tests.tables import table_outcome

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies with one study of three trials."""
    folder = tmp_path_factory.mktemp("whole")
    setting = setting_of(space_of())
    study = Store(folder).create("one", setting)
    for index in range(3):
        choices = tuple(index for _ in setting.table.layers)
        trial = study.begin(Proposal(choices=choices, origin="test"), index=index)
        study.finish(trial, table_outcome(setting.table, choices))
    return folder


@pytest.fixture(scope="module")
def copy(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(whole, tmp_path_factory.mktemp("copy") / "studies")


def read(folder: Path) -> None:
    with contextlib.suppress(RanksearchError):
        study = Store(folder).open("one")
        for trial in study.trials():
            assert trial.outcome is None or Path(trial.outcome.weights or "x").name == (trial.outcome.weights or "x")
        study.front_trials()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal(folder).read_text(encoding="utf-8").splitlines()]


def journal(folder: Path) -> Path:
    return folder / "studies" / "one" / "journal.log"


@given(position=st.floats(0, 1), content=st.binary(max_size=30), cut=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_of_the_journal(whole: Path, copy: Path, position: float, content: bytes, cut: bool) -> None:
    intact = journal(whole).read_bytes()
    at = int(position * len(intact))
    journal(copy).write_bytes(intact[:at] + content + (b"" if cut else intact[at + len(content) :]))
    read(copy)


@given(data=st.data(), value=values)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_record(whole: Path, copy: Path, data: st.DataObject, value: object) -> None:
    records = lines(whole)
    record = data.draw(st.sampled_from(records))
    attribute = next((record[key] for key in ("user_attr", "system_attr") if record.get(key)), None)
    if attribute is None or data.draw(st.booleans()):
        record[data.draw(st.sampled_from(sorted(record)))] = value
    else:
        key = data.draw(st.sampled_from(sorted(attribute)))
        inner = attribute[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(sorted(inner)))] = value
        else:
            attribute[key] = value
    journal(copy).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    read(copy)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b"])
def test_weights_are_files_of_the_study(name: str) -> None:
    outcome = {"accuracy_search": 0.5, "loss": 1.0, "macs": 1, "params": 1, "seconds": 0.1}
    assert Outcome.from_json({**outcome, "weights": "12.safetensors"}).weights == "12.safetensors"
    with pytest.raises(ValueError, match="weights must be a file of the study's folder"):
        Outcome.from_json({**outcome, "weights": name})
