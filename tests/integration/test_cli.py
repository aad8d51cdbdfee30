"""The command line on a real search of a real network: what it prints, writes and returns."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import ranksearch
from ranksearch.cli import main
from ranksearch.data import load_data
from ranksearch.export import load_compressed, read_compressed
from ranksearch.models import build_model
from ranksearch.space import DataSpec, ModelSpec
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.xdist_group("cli")  # by one worker: what its tests share is made once

QUICKSTART = str(REPOSITORY / "search_spaces" / "quickstart.yaml")
SMALL = [
    "data.train_images=400",
    "data.calibration_images=128",
    "data.search_images=200",
    "data.report_images=300",
    "evaluation.refit_images=128",
    "evaluation.select_images=64",
    "strategy.seed_points=4",
    "budget.trials=10",
]
TRIALS = 10
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
COMMANDS = [
    "inspect",
    "search",
    "resume",
    "trials",
    "front",
    "export",
    "apply",
    "evaluate",
    "ui",
    "schema",
    "decompose",
    "compare",
    "submit",
    "jobs",
    "status",
    "logs",
    "stop",
    "doctor",
    "finetune",
    "report",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    out: str
    err: str

    def error(self, *parts: str, code: int = 2) -> None:
        """Check for an error that says ``parts``, with no traceback."""
        shown = " ".join(self.err.split())
        assert self.code == code, shown
        assert "Traceback" not in shown
        for part in parts:
            assert part in shown


def with_settings(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def shell(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from ranksearch.cli import main; main()", *arguments]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, out, err)

    return run


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A storage with the finished study ``done``, and what its search printed."""
    folder = tmp_path_factory.mktemp("storage")
    command = shell("search", QUICKSTART, *with_settings(SMALL), "--study", "done", "--storage", str(folder))
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, cwd=folder, env=ENVIRONMENT
    )
    assert ended.returncode == 0, ended.stderr
    assert not (folder / "mlruns").exists()
    assert ended.stderr.count("of the MACs") == TRIALS, "one line of progress a trial"
    return folder, ended.stdout


@pytest.fixture
def done(searched: tuple[Path, str], storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage with the study ``done``, where commands look by themselves."""
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(searched[0]))
    return searched[0]


def raw_study(storage: Path, name: str = "done") -> optuna.Study:
    """The study as plain Optuna reads it."""
    journal = JournalStorage(JournalFileBackend(str(storage / "studies" / name / "journal.log")))
    return optuna.load_study(study_name=name, storage=journal)


# What is imported, and the help.


def test_the_public_door() -> None:
    assert ranksearch.__all__ == [
        "Comparison", "RankMap", "RanksearchError", "Space", "Study", "compare", "inspect", "load_space", "open_study",
        "parse_space", "resume", "search",
    ]  # fmt: skip
    assert dir(ranksearch) == ranksearch.__all__
    for name in ranksearch.__all__:
        assert callable(getattr(ranksearch, name))
    assert ranksearch.search.__name__ == "search"
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        getattr(ranksearch, "serach")  # noqa: B009


def test_importing_and_asking_for_help_is_quick() -> None:
    script = f"""
import json, sys
import ranksearch
from ranksearch.cli import main
for command in [[], *([name] for name in {COMMANDS})]:
    try:
        main([*command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
print(json.dumps(sorted({{"torch", "ray", "mlflow", "optuna", "pandas", "numpy"}} & set(sys.modules))))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True, env=ENVIRONMENT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(ended.stdout.splitlines()[-1]) == []
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10, "seconds of work"
    for name in COMMANDS:
        assert f"Example: ranksearch {name}" in ended.stdout


def test_schema_describes_a_space(run: Any) -> None:
    schema = json.loads(run("schema").out)
    assert schema["additionalProperties"] is False
    assert {"model", "data", "budget", "strategy"} <= set(schema["properties"])


# Reading a space and a study.


def test_inspect_shows_every_layer_and_trains_no_trial(run: Any, done: Path) -> None:
    price = with_settings(["strategy.name=auto", "strategy.price=output"])
    ended = run("inspect", QUICKSTART, *with_settings(SMALL), *price, "--json")
    assert "scoring the dense network" in ended.err
    assert "measuring prices" not in ended.err, "which only a search needs"
    found = json.loads(ended.out)
    model = build_model(ModelSpec(name="digits-cnn"), weights=None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    assert {row["name"] for row in found["layers"]} == set(layers)
    for row in found["layers"]:
        weight = layers[row["name"]].weight
        assert [row["out_channels"], row["in_channels"]] == list(weight.shape[:2])
        assert (row["candidates"] > 1) == row["searched"] == (not row["reason"])
        assert sum(row["formats"].values()) == row["candidates"] - 1
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    assert 2 * sum(row["macs"] for row in found["layers"]) == counter.get_total_flops()
    assert not {row["name"] for row in found["layers"] if row["searched"]} & {"stem", "linear"}
    shown = run("inspect", QUICKSTART, *with_settings(SMALL)).out
    assert "stays dense: stem" in shown
    assert "7 of 9 layers searched" in shown
    assert [path.name for path in (done / "studies").iterdir()] == ["done"]


def test_search_ends_with_the_front_and_what_to_do_next(searched: tuple[Path, str]) -> None:
    folder, out = searched
    trials = {int(number) for number in re.findall(r"^\s*(\d+)\s+\d+\.\d\d ", out, re.MULTILINE)}
    assert trials == {trial.number for trial in raw_study(folder).best_trials}
    for command in ("front done", "export done --knee", "resume done --trials 20", "ui done"):
        assert f"ranksearch {command}" in out


def test_commands_to_go_on_can_be_copied(run: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "my studies; all"
    shutil.copytree(done, place, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    ended = run("resume", "done", "--trials", 1, "--storage", place)
    assert ended.code == 0, ended.err
    assert f"Nothing to do: {TRIALS} proposals are made already" in ended.out
    assert json.loads(run("trials", "done", "--json", "--storage", place).out)
    commands = [line.strip() for line in ended.out.splitlines() if line.strip().startswith("ranksearch ")]
    assert {command.split()[1] for command in commands} >= {"front", "export", "evaluate", "resume"}
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("--storage") + 1] == str(place)
        assert f"--trials {2 * TRIALS}" in command or words[1] != "resume"
    monkeypatch.chdir(tmp_path)
    for name in ("export", "evaluate"):
        (command,) = (one for one in commands if one.split()[1] == name)
        ended = run(*shlex.split(command)[1:])
        assert ended.code == 0, ended.err


def test_front_is_optunas(run: Any, done: Path, tmp_path: Path) -> None:
    rows = json.loads(run("front", "done", "--json").out)
    assert len(rows) >= 3
    best = {trial.number: trial for trial in raw_study(done).best_trials}
    assert {row["trial"] for row in rows} == set(best)
    dense = raw_study(done).user_attrs["ranksearch"]
    dense_macs = json.loads(dense)["dense"]["macs"]
    for row in rows:
        assert [row["accuracy_search"], row["macs"]] == best[row["trial"]].values
        assert row["macs_ratio"] == pytest.approx(row["macs"] / dense_macs)
        assert row["gmacs"] == pytest.approx(row["macs"] / 1e9)
        assert 0 <= row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] <= 1
        assert isinstance(row["params"], int)
    table = list(csv.DictReader(io.StringIO(run("front", "done", "--csv").out)))
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in rows]
    page = tmp_path / "front.html"
    assert run("front", "done", "--html", page).code == 0
    assert "plotly" in page.read_text().lower()
    assert os.listdir(tmp_path) == ["front.html"]
    assert str(rows[0]["trial"]) in run("front", "done").out
    run("front", "done", "--json", "--csv").error("only one of --json, --csv")


def test_trials_lists_all(run: Any, done: Path) -> None:
    rows = json.loads(run("trials", "done", "--json").out)
    assert [row["number"] for row in rows] == list(range(TRIALS))
    assert [row["state"] for row in rows] == [trial.state.name for trial in raw_study(done).trials]
    assert all(row["reason"] is None for row in rows)
    assert all(isinstance(row["macs"], int) for row in rows)
    table = list(csv.DictReader(io.StringIO(run("trials", "done", "--csv").out)))
    assert [int(row["macs"]) for row in table] == [row["macs"] for row in rows]
    assert run("trials", "done").out.count("COMPLETE") == TRIALS


# From a trial to a file and back.


def evaluated(run: Any, *arguments: object) -> dict[str, Any]:
    ended = run("evaluate", *arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_every_front_point_evaluates_to_exactly_its_trial(run: Any, done: Path, tmp_path: Path) -> None:
    for row in json.loads(run("front", "done", "--json").out):
        target, weights = tmp_path / "map.json", tmp_path / "weights.safetensors"
        ended = run("export", "done", "--trial", row["trial"], "-o", target, "--save-weights", weights)
        assert ended.code == 0, ended.err
        for file in (target, weights) if row["macs_ratio"] > 0.5 else (target,):
            found = evaluated(run, file)
            ours = found["compressed"]
            assert (ours["accuracy"], ours["macs"], ours["params"]) == (row["accuracy"], row["macs"], row["params"])
            assert (ours["accuracy_low"], ours["accuracy_high"]) == (row["accuracy_low"], row["accuracy_high"])
            assert found["recorded_accuracy"] == row["accuracy"]
            assert found["factors"] == "stored"
            assert min(ours["latency_ms_batch_1"], ours["latency_ms_batch_64"]) > 0
            assert found["same_dense"]
    shown = run("evaluate", target).out
    assert "latency ms, batch 64" in shown
    assert "the same." in shown


def dominated(run: Any) -> dict[str, Any]:
    rows = json.loads(run("trials", "done", "--json").out)
    row: dict[str, Any] = next(row for row in rows if not row["on_front"])
    return row


def test_a_dominated_trial_is_built_again_exactly(run: Any, done: Path, tmp_path: Path) -> None:
    row = dominated(run)
    kept = sorted((done / "studies/done/weights").iterdir())
    target, weights = tmp_path / "map.json", tmp_path / "weights.safetensors"
    ended = run("export", "done", "--trial", row["number"], "-o", target, "--save-weights", weights)
    assert ended.code == 0, ended.err
    assert sorted((done / "studies/done/weights").iterdir()) == kept

    rank_map, file = read_compressed(target)
    assert file is not None
    dense = build_model(ModelSpec(name="digits-cnn"), weights=None)
    model = load_compressed(rank_map, dense, file)
    spec = DataSpec.model_validate(rank_map.provenance["data"])
    split = load_data(spec, cache=tmp_path, seed=0).search
    images = (torch.tensor(split.images).permute(0, 3, 1, 2) / 255 - spec.mean[0]) / spec.std[0]
    with torch.no_grad():
        right = (model(images).argmax(1).numpy() == split.labels).mean()
    assert right == pytest.approx(row["accuracy_search"], abs=1e-12)

    found = evaluated(run, target)
    assert found["compressed"]["accuracy"] == found["recorded_accuracy"] == rank_map.metrics["accuracy"]
    assert found["compressed"]["macs"] == row["macs"]


def test_a_trial_that_differs_is_not_exported(
    run: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dominated(run)
    copy = tmp_path / "storage"
    shutil.copytree(done, copy)
    journal = copy / "studies/done/journal.log"
    lines = []
    for line in journal.read_text().splitlines():
        record = json.loads(line)
        outcome = record.get("user_attr", {}).get("outcome")
        if outcome and record["trial_id"] == row["number"]:
            outcome["accuracy_search"] = 0.123
        lines.append(json.dumps(record))
    journal.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(copy))
    target, weights = tmp_path / "map.json", tmp_path / "weights.safetensors"
    ended = run("export", "done", "--trial", row["number"], "-o", target, "--save-weights", weights)
    ended.error("must score as recorded", "0.123", code=1)
    assert os.listdir(tmp_path) == ["storage"]


def test_export_picks_by_its_rule(run: Any, done: Path, tmp_path: Path) -> None:
    front = json.loads(run("front", "done", "--json").out)
    dense = json.loads(raw_study(done).user_attrs["ranksearch"])["dense"]
    target = tmp_path / "map.json"

    def picked(*rule: object) -> int:
        ended = run("export", "done", *rule, "-o", target)
        assert ended.code == 0, ended.err
        number: int = json.loads(target.read_text())["provenance"]["trial"]
        return number

    fit = [row for row in front if row["macs_ratio"] <= 0.5]
    assert picked("--max-macs-ratio", 0.5) == max(fit, key=lambda row: row["accuracy_search"])["trial"]
    assert picked("--max-gmacs", fit[0]["gmacs"]) == front[0]["trial"]
    drop = 100 * (dense["accuracy_search"] - front[-2]["accuracy_search"]) + 1e-6
    assert picked("--max-drop", drop) == front[-2]["trial"]
    assert picked("--knee") in {row["trial"] for row in front}
    assert os.listdir(tmp_path) == ["map.json"]


def test_export_needs_exactly_one_rule_and_a_trial_that_fits(run: Any, done: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.json"
    run("export", "done", "-o", target).error("exactly one rule", "found none")
    run("export", "done", "--knee", "--trial", 1, "-o", target).error("exactly one rule", "--knee, --trial")
    run("export", "done", "--max-macs-ratio", 1.5, "-o", target).error("--max-macs-ratio", "less than or equal to 1")
    run("export", "done", "--max-gmacs", 1e-9, "-o", target).error("the cheapest of the front", code=1)
    run("export", "done", "--trial", 999, "-o", target).error("there is none", code=1)
    run("export", "done", "--knee", "-o", tmp_path / "no" / "map.json").error("folder that exists")
    run("export", "none", "--knee", "-o", target).error("there must be a study 'none'", "found: done")
    assert not os.listdir(tmp_path)


@pytest.fixture
def bare_map(run: Any, done: Path, tmp_path: Path) -> Path:
    """A rank map without weights."""
    target = tmp_path / "bare.json"
    assert run("export", "done", "--max-macs-ratio", 0.7, "-o", target).code == 0
    return target


def test_apply_decomposes_afresh(run: Any, done: Path, bare_map: Path, tmp_path: Path) -> None:
    rank_map = json.loads(bare_map.read_text())
    afresh = evaluated(run, bare_map)
    assert afresh["factors"] == "weight-only"
    assert "decomposed afresh" in run("evaluate", bare_map).out
    plain, aware = tmp_path / "plain.safetensors", tmp_path / "aware.safetensors"
    dense = rank_map["model"]["weights"]
    assert run("apply", bare_map, "--model", "digits-cnn", "--weights", dense, "-o", plain).code == 0
    assert "activation-aware" in run("apply", bare_map, "--data", "recorded", "-o", aware).out
    found = [evaluated(run, file) for file in (plain, aware)]
    assert [one["compressed"]["macs"] for one in found] == [rank_map["macs"]] * 2
    assert found[0]["compressed"]["accuracy"] == afresh["compressed"]["accuracy"]
    assert found[0]["recorded_accuracy"] is None
    one, other = load_file(plain), load_file(aware)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    # The factors of one kind lose least on weights, those of the other on activations: they differ.
    assert any(not torch.allclose(one[key], other[key]) for key in one)
    assert run("evaluate", plain, "--data", QUICKSTART).code == 0


def test_apply_exports_a_network_that_runs(run: Any, done: Path, tmp_path: Path) -> None:
    rank_map, weights = tmp_path / "map.json", tmp_path / "compressed.safetensors"
    assert run("export", "done", "--knee", "-o", rank_map, "--save-weights", weights).code == 0
    ended = run("apply", rank_map, "--to", "python", "-o", tmp_path / "network.py")
    assert ended.code == 0, ended.err
    assert "the same class for 100.00 %" in ended.out
    manifest = json.loads((tmp_path / "network.py.manifest.json").read_text())
    assert manifest["comparison"]["images"] == 500  # 200 search and 300 report images
    found = json.loads(rank_map.read_text())
    right = 200 * found["metrics"]["accuracy_search"] + 300 * found["metrics"]["accuracy"]
    assert manifest["comparison"]["accuracy"] == pytest.approx(right / 500, abs=1e-9)
    run("apply", rank_map, "--to", "onnx", "-o", tmp_path / "network.py").error("must end in .onnx", code=1)
    run("apply", rank_map, "--images", "noise", "-o", tmp_path / "n.safetensors").error("go with --to")


def test_a_rank_map_for_another_model_is_refused(run: Any, bare_map: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(build_model(ModelSpec(name="resnet20"), weights=None).state_dict(), weights)
    output = tmp_path / "compressed.safetensors"
    ended = run("apply", bare_map, "--model", "resnet20", "--weights", weights, "-o", output)
    ended.error("shape (1, 8, 8)")
    record = json.loads(bare_map.read_text())
    record["layers"]["block9.conv1"] = next(iter(record["layers"].values()))
    strange = tmp_path / "strange.json"
    strange.write_text(json.dumps(record))
    for command in (("apply", strange, "-o", output), ("evaluate", strange)):
        run(*command).error("must be for the model it is applied to", "no layer block9.conv1")
    run("evaluate", bare_map, "--weights", weights).error("weights must fit the model", "missing keys")
    run("evaluate", tmp_path / "no.json").error("cannot read the rank map")
    run("evaluate", weights).error("must hold a rank map")
    run("evaluate", bare_map, "--data", tmp_path / "no").error("data must be a space file, a folder")
    run("evaluate", bare_map, "--data", tmp_path).error("come from 'digits'", "Give a space file")
    assert not output.exists()


# Bad input.


SPACE = """
model: {name: resnet20, weights: dense.safetensors}
data:
  source: npz
  root: .
  train: [train.npz]
  validation: [validation.npz]
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
"""


@pytest.fixture
def project(tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a space, a network and images, all sound; afterwards no study was made."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "space.yaml").write_text(SPACE)
    save_file(build_model(ModelSpec(name="resnet20"), weights=None).state_dict(), folder / "dense.safetensors")
    generator = np.random.default_rng(0)
    for name, count in (("train", 12), ("validation", 10)):
        images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 10)
    yield folder
    assert not (storage / "studies").exists(), "nothing half-written"
    assert not list(storage.rglob("*.part"))


def test_mistakes_in_a_space_are_told_all_at_once(run: Any, project: Path) -> None:
    (project / "space.yaml").write_text(SPACE + "budget: {trails: 3}\nseed: soon\n")
    ended = run("search", "space.yaml")
    ended.error("2 problems", "$.budget.trails: unknown key", "Did you mean `trials`?", "$.seed", "'soon'")
    names = "formats: [tucker2, tukcer2]\nfix: {conv1: {format: cpd, ranks: [1]}}\n"
    names += "strategy: {name: optuan, sampler: tpee}\n"
    (project / "space.yaml").write_text(SPACE + "sede: 1\n" + names)
    for command in ("inspect", "search"):
        told = run(command, "space.yaml")
        told.error("5 problems", "$.sede: unknown key", "$.formats[1]", "'tukcer2'", "$.fix.conv1.format", "'cpd'")
        told.error("$.strategy.name", "'optuan'", "$.strategy.sampler", "'tpee'")
    space = {"model": {"name": "digits-cnn"}, "formats": ["cpd"], "strategy": {"name": "optuan"}}
    with pytest.raises(ranksearch.RanksearchError, match="2 problems"):
        ranksearch.search(ranksearch.parse_space(space))
    run("search", "space.yaml", "--set", "trials").error("a setting must be dotted.key=value")
    run("inspect", "nowhere.yaml").error("Check the path")
    run("search", "space.yaml", "--sett", "a=1").error("--sett")


def test_weights_that_are_missing_or_do_not_fit(run: Any, project: Path) -> None:
    state = load_file(project / "dense.safetensors")
    run("search", "space.yaml", "--set", "model.weights=other.pt").error("the weights file other.pt must exist")
    run("search", "space.yaml", "--set", "model.weights=null").error("must name the pretrained weights")
    changed = {("renamed" if name == "conv1.weight" else name): x for name, x in state.items()}
    save_file(changed, project / "dense.safetensors")
    run("search", "space.yaml").error("missing keys: conv1.weight", "unexpected keys: renamed")
    save_file({**state, "linear.bias": torch.full((10,), torch.nan)}, project / "dense.safetensors")
    run("search", "space.yaml").error("must be finite", "linear.bias")
    (project / "dense.safetensors").write_bytes(b"garbage")
    run("search", "space.yaml").error("cannot read the weights")


def test_data_that_is_empty_or_mislabelled(run: Any, project: Path) -> None:
    images = np.load(project / "validation.npz")["images"]

    def refused(labels: Any, *parts: str, images: Any = images) -> None:
        np.savez(project / "validation.npz", images=images, labels=labels)
        run("search", "space.yaml").error(*parts)

    refused(np.zeros(0, int), "at least one", images=images[:0])
    refused(np.arange(10) - 1, "labels must", "found -1")
    refused(np.arange(10) + 1, "labels must lie among the network's outputs", "11 classes")
    refused(np.arange(9), "one label an image")
    run("search", "space.yaml", "--set", "data.validation=[none.npz]").error("none.npz")


def test_a_damaged_study_is_told(run: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "storage"
    (copy / "studies/done").mkdir(parents=True)
    journal = copy / "studies/done/journal.log"
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(copy))
    for content in (b"\x00\xff garbage\nmore\n", b"[]\n{}\n", b'{"op_code": 0}\n', b""):
        journal.write_bytes(content)
        for command in (("front", "done", "--json"), ("resume", "done"), ("export", "done", "--knee")):
            ended = run(*command)
            ended.error("cannot be read")
            assert not ended.out
        assert journal.read_bytes() == content
    run("front", "../done").error("the name of a study must be")


def test_a_name_that_is_taken(run: Any, done: Path) -> None:
    run("search", QUICKSTART, "--study", "done").error("must have a new name", "ranksearch resume done")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(run: Any, done: Path, small_disk: Path, tmp_path: Path) -> None:
    weights = small_disk / "weights.safetensors"
    options = ("--max-macs-ratio", 1, "-o", tmp_path / "map.json")
    run("export", "done", *options, "--save-weights", weights).error("No space left", "space left")
    assert not os.listdir(small_disk)
    assert not (tmp_path / "map.json").exists()
    ended = run("front", "done", "--html", small_disk / "front.html")
    ended.error("the disk is full", code=1)
    assert not os.listdir(small_disk)
    ended = run("search", QUICKSTART, *with_settings(SMALL), "--storage", small_disk)
    ended.error("No space left")
    assert not list(small_disk.glob("studies/*"))


# Searches that go wrong.


FRAGILE = '''
import torch
from torch import nn


class Fragile(nn.Module):
    """Runs as it is, and breaks once its layer is replaced."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        if not isinstance(self.conv, nn.Conv2d):
            raise RuntimeError("the layer was replaced")
        return self.linear(self.conv(self.stem(x).relu()).mean((2, 3)))
'''


def test_a_search_whose_trials_all_fail(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fragile_network.py").write_text(FRAGILE)
    (tmp_path / "space.yaml").write_text("model: {name: 'fragile_network:Fragile'}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = ["budget.trials=2", "tracking.enabled=false", "formats=[tucker2]", "strategy.name=random"]
    settings += ["strategy.seeds=[]", "data.calibration_images=32", "evaluation.refit=false"]
    ended = run("search", "space.yaml", *with_settings(settings), "--study", "fragile", "--quiet")
    ended.error("all 2 trials of fragile failed", "the layer was replaced", code=1)
    rows = json.loads(run("trials", "fragile", "--json").out)
    assert [row["state"] for row in rows] == ["FAIL", "FAIL"]
    assert all("the layer was replaced" in row["reason"] for row in rows)
    assert rows[0]["accuracy_search"] is None
    assert json.loads(run("front", "fragile", "--json").out) == []
    run("export", "fragile", "--knee").error("has no point yet", code=1)
    run("ui", "fragile").error("was not tracked")


@pytest.mark.slow
def test_ctrl_c_then_resume(run: Any, done: Path) -> None:
    settings = [*SMALL, "budget.trials=400", "tracking.enabled=false"]
    command = shell("search", QUICKSTART, *with_settings(settings), "--study", "stopped")
    environment = {**ENVIRONMENT, "RANKSEARCH_STORAGE": str(done)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    try:
        for line in process.stderr:
            if line.startswith("trial    2"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "ranksearch resume stopped" in err
    assert "accuracy %" in out
    rows = json.loads(run("trials", "stopped", "--json").out)
    assert {row["state"] for row in rows} <= {"COMPLETE", "FAIL"}
    assert sum(row["state"] == "COMPLETE" for row in rows) >= 3
    ended = run("resume", "stopped", "--trials", len(rows) + 1)
    assert ended.code == 0, ended.err
    after = json.loads(run("trials", "stopped", "--json").out)
    assert after[: len(rows)] == [{**row, "on_front": new["on_front"]} for row, new in zip(rows, after, strict=False)]
    complete = [row["index"] for row in after if row["state"] == "COMPLETE"]
    assert sorted(complete) == list(range(len(rows) + 1))


@pytest.mark.slow
def test_ui_serves_the_studys_runs(done: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        shell("ui", "done", "--port", str(port), "--storage", str(done)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in first
        assert "experiment: ranksearch" in first
        body = b""
        for _ in range(240):
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
                    data=b'{"max_results": 10}',
                    headers={"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=5) as answer:
                    body = answer.read()
                break
            except OSError:
                time.sleep(0.5)
        assert "ranksearch" in {one["name"] for one in json.loads(body)["experiments"]}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 0
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
    finally:
        process.terminate()  # not killed: its server would outlive it
        process.wait(timeout=60)
        process.stdout.close()  # type: ignore[union-attr]
