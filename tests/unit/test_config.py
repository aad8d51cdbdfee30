"""Space files: every mistake is named, with its address, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranksearch.config import json_schema, load_space, parse_space, recorded_space
from ranksearch.errors import Problem, SpaceError
from ranksearch.space import PinnedSpec, Space


def problems(data: dict[str, object]) -> dict[str, Problem]:
    with pytest.raises(SpaceError) as caught:
        parse_space({"model": {"name": "resnet20"}, **data})
    return {problem.address: problem for problem in caught.value.problems}


def write(folder: Path, text: str, name: str = "my-space.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_model_is_enough(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, "model: {name: resnet20}"))
    assert (space.name, space.model.name, space.budget.trials, space.deterministic) == (
        "my-space",
        "resnet20",
        60,
        True,
    )


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    found = problems(
        {
            "budget": {"trials": 0, "max_macs_ratio": 1.5},
            "ranks": {"ratios": [0.5, 2.0]},
            "data": {"root": 7},
            "objectives": ["accuracy", "speed"],
            "evaluation": {"fine_tune": {"steps": -1}},
        }
    )
    assert found.keys() == {
        "$.budget.trials",
        "$.budget.max_macs_ratio",
        "$.ranks.ratios[1]",
        "$.data.root",
        "$.objectives[1]",
        "$.evaluation.fine_tune.steps",
    }
    assert found["$.ranks.ratios[1]"].value == "2.0"
    assert all(problem.rule and problem.remedy for problem in found.values())


@pytest.mark.parametrize(
    "mistake",
    [
        {},
        {"budgte": {}},
        {"model": {"nme": "resnet20"}},
        {"model": None},
        {"budget": {"trails": 3}},
        {"ranks": {"ratios": [0.5, 2.0]}},
        {"fix": {"conv1": {"format": "svd"}}},
        {"data": {"mean": [0.5, 0.5]}},
        {"strategy": {"sampler": "tpee", "bacth": 3, "seed_points": -1}},
    ],
)
def test_a_check_sees_what_is_sound_and_its_problems_join_the_others(mistake: dict[str, object]) -> None:
    def check(space: Space) -> list[Problem]:
        found = f"{space.formats} {space.strategy.sampler}"
        return [Problem(address="$.checked", rule="", value=found, remedy="")]

    data = {"model": {"name": "resnet20"}, "formats": ["tucker"], "strategy": {"sampler": "tpee"}, **mistake}
    with pytest.raises(SpaceError) as alone:
        parse_space(data, "space", check)
    found = {problem.address: problem for problem in alone.value.problems}
    assert found.pop("$.checked").value == "['tucker'] tpee"
    if mistake:
        with pytest.raises(SpaceError) as others:
            parse_space(data)
        assert list(found.values()) == list(others.value.problems)
    else:
        assert not found


@pytest.mark.parametrize(
    ("data", "address", "remedy"),
    [
        ({"budgett": {}}, "$.budgett", "Did you mean `budget`?"),
        ({"budget": {"trails": 3}}, "$.budget.trails", "Did you mean `trials`?"),
        ({"evaluation": {"fine_tune": {"stepz": 3}}}, "$.evaluation.fine_tune.stepz", "Did you mean `steps`?"),
        (
            {"budget": {"zzz": 3}},
            "$.budget.zzz",
            "Known here: trials, minutes, targets, max_macs_ratio, max_latency_ratio, max_drop.",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(data: dict[str, object], address: str, remedy: str) -> None:
    assert problems(data)[address].remedy == remedy


def test_an_unknown_key_of_a_pin_gets_the_keys_of_pins() -> None:
    found = problems({"fix": {"conv1": {"frmat": "tucker2", "ranks": [2, 2]}}})
    assert any(p.remedy == "Did you mean `format`?" for address, p in found.items() if address.endswith(".frmat"))


def test_pins_are_dense_or_a_format_with_ranks() -> None:
    pins = {"conv1": "dense", "layer1.*": {"format": "tucker2", "ranks": [4, 5]}}
    space = parse_space({"model": {"name": "a"}, "fix": pins})
    assert space.fix == {"conv1": "dense", "layer1.*": PinnedSpec(format="tucker2", ranks=[4, 5])}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_must_be_finite(value: float) -> None:
    tune = {"learning_rate": value, "distill": value}
    found = problems({"evaluation": {"fine_tune": tune}, "data": {"mean": [value]}, "budget": {"minutes": value}})
    assert {"$.evaluation.fine_tune.learning_rate", "$.data.mean[0]", "$.budget.minutes"} <= found.keys()


@pytest.mark.parametrize(
    "data",
    [
        {"objectives": ["accuracy", "accuracy"]},
        {"objectives": ["accuracy", "loss"]},
        {"objectives": ["macs", "params"]},
        {"data": {"mean": [0.1, 0.2], "std": [1.0]}},
        {"evaluation": {"fine_tune": {"steps": 3, "epochs": 1}}},
    ],
)
def test_keys_must_agree_with_each_other(data: dict[str, object]) -> None:
    assert len(problems(data)) == 1


def test_settings_change_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: resnet20}\nstrategy:\nbudget: {trials: 3}\n")
    settings = ["budget.trials=40", "strategy.sampler=tpe", "evaluation.fine_tune.learning_rate=1e-3", "formats=[svd]"]
    space = load_space(path, settings)
    assert (space.budget.trials, space.strategy.sampler, space.formats) == (40, "tpe", ["svd"])
    assert space.evaluation.fine_tune.learning_rate == 0.001


@pytest.mark.parametrize(
    "setting", ["", "budget", "=3", "budget.=3", ".trials=3", "budget.trials.more=3", "seed=[", "x=1"]
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(SpaceError):
        load_space(write(tmp_path, "model: {name: resnet20}\nbudget: {trials: 3}\n"), [setting])


def test_environment_variables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "model: {name: a}\ndata: {root: '${MY_DATA}/cifar', train: ['${MY_DATA}']}\n")
    monkeypatch.setenv("MY_DATA", "/somewhere")
    data = load_space(path).data
    assert (data.root, data.train) == ("/somewhere/cifar", ["/somewhere"])
    monkeypatch.delenv("MY_DATA")
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    assert [problem.address for problem in caught.value.problems] == ["$.data.root", "$.data.train[0]"]
    assert "--set data.root=..." in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("model: [", "valid YAML"),
        ("model: {name: a}\nmodel: {name: b}", "given twice"),
        ("model: {name: a}\n[1, 2]: 3", "plain text"),
        ("model: {name: a}\nbudget: !!python/object:os.system {}", "valid YAML"),
        ("model: !!timestamp never", "valid YAML"),
        ("model: !!bool perhaps", "valid YAML"),
        ("model: &a {name: b, options: *a}", "must not hold itself"),
        ("model: {name: a}\nseed: -0x" + "f" * 5000, "very large number"),
        ("[" * 3000, "valid YAML"),
        ("model: {name: a}\n1: 2", "strings"),
    ],
)
def test_a_file_that_is_no_space_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        load_space(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(SpaceError, match="readable UTF-8"):
            load_space(path)


def test_every_key_is_described_in_the_schema() -> None:
    schema = json_schema()
    sections = {name: body for name, body in schema["$defs"].items() if "properties" in body}
    assert {"BudgetSpec", "RanksSpec", "StrategySpec"} <= sections.keys()
    assert all(body["additionalProperties"] is False for body in (schema, *sections.values()))
    assert all(body["description"] for body in sections.values())
    for body in (schema, *sections.values()):
        bare = [key for key, of in body["properties"].items() if not {"description", "$ref"} & of.keys()]
        assert not bare, "a key that is no section has a description of its own"
    assert schema["required"] == ["model"]


def test_a_study_from_before_price_points_has_measured_all() -> None:
    now = parse_space({"model": {"name": "resnet20"}, "strategy": {"name": "greedy", "price": "loss"}})
    written = now.model_dump(mode="json")
    assert recorded_space(written) == now
    assert now.strategy.price_points == 6
    del written["strategy"]["price_points"]
    before = recorded_space(written)
    assert before.strategy == now.strategy.model_copy(update={"price_points": None})
    assert "price_points" not in written["strategy"], "what is read is not changed"


@pytest.mark.parametrize(("optimiser", "rate"), [("adam", 3e-4), ("sgd", 1e-2)])
def test_a_study_from_before_rates_were_recorded_goes_on_with_those_of_its_time(optimiser: str, rate: float) -> None:
    given = {"steps": 3, "optimiser": optimiser, "temperature": 2.0, "learning_rate": 0.5}
    now = parse_space({"model": {"name": "resnet20"}, "evaluation": {"fine_tune": given}})
    written = now.model_dump(mode="json")
    assert recorded_space(written) == now
    written["evaluation"]["fine_tune"]["learning_rate"] = None
    tuned = recorded_space(written).evaluation.fine_tune
    assert tuned == now.evaluation.fine_tune.model_copy(update={"learning_rate": rate})
    assert written["evaluation"]["fine_tune"]["learning_rate"] is None, "what is read is not changed"


def test_rate_and_temperature_go_by_the_optimiser_unless_given() -> None:
    def tuned(**given: object) -> tuple[float, float]:
        space = parse_space({"model": {"name": "resnet20"}, "evaluation": {"fine_tune": given}})
        return space.evaluation.fine_tune.learning_rate, space.evaluation.fine_tune.temperature

    assert tuned() == (0.001, 8.0)
    assert tuned(optimiser="sgd") == (0.01, 2.0)
    assert tuned(optimiser="sgd", temperature=4.0) == (0.01, 4.0)
    assert tuned(learning_rate=0.1) == (0.1, 8.0)
    wrong = {"evaluation": {"fine_tune": {"optimiser": "adagrad"}}}
    assert problems(wrong).keys() == {"$.evaluation.fine_tune.optimiser"}


def test_a_wrong_key_leaves_its_neighbours_to_be_checked() -> None:
    seen: list[int] = []

    def check(space: Space) -> list[Problem]:
        seen.append(space.evaluation.fine_tune.steps)
        return []

    tune = {"steps": 400, "batch_images": 0}
    with pytest.raises(SpaceError) as caught:
        parse_space({"model": {"name": "resnet20"}, "evaluation": {"fine_tune": tune}}, check=check)
    assert [problem.address for problem in caught.value.problems] == ["$.evaluation.fine_tune.batch_images"]
    assert seen == [400]
