"""One layer of a network in every format, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ranksearch.cli import main
from ranksearch.data import load_data, to_input
from ranksearch.decompositions import FORMATS
from ranksearch.models import build_model
from ranksearch.space import DataSpec, ModelSpec
from tests import oracles
from tests.networks import GroupedNet


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Some weights of a ResNet-20."""
    path = tmp_path / "dense.safetensors"
    save_file(dict(build_model(ModelSpec(name="resnet20"), weights=None).state_dict()), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def decompose(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    code, out, err = run(capsys, "decompose", *arguments, "--json")
    assert not code, err
    return json.loads(out)


def test_a_format_at_some_ranks(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "resnet20", "--weights", weights, "--layer", "layer2.1.conv1")
    found = decompose(capsys, *arguments, "--format", "tucker2", "--rank", "16,12")
    row = found["chosen"]
    kernel = build_model(ModelSpec(name="resnet20"), weights=weights).layer2[1].conv1.weight.detach().double().numpy()
    lost = np.linalg.norm(kernel - oracles.hosvd(kernel, 16, 12)) ** 2 / np.linalg.norm(kernel) ** 2
    assert row["relative_error"] == pytest.approx(lost, rel=1e-4)
    assert row["macs"] == 16 * 16 * (32 * 16 + 9 * 16 * 12 + 12 * 32)
    assert found["macs"] == 16 * 16 * 9 * 32 * 32
    assert row["seconds"] > 0
    assert row["sensitivity"] > 0
    assert found["rows"] == []
    assert found["kind"] == "weight-only"


@pytest.mark.slow
def test_every_format_against_its_macs(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "resnet20", "--weights", weights, "--layer", "layer1.0.conv1")
    found = decompose(capsys, *arguments, "--plot", tmp_path / "errors.html")
    assert {row["format"] for row in found["rows"]} | set(found["refused"]) == set(FORMATS)
    assert set(found["refused"]) == {"svd"}
    for name in FORMATS.keys() - {"svd"}:
        rows = [row for row in found["rows"] if row["format"] == name]
        assert len(rows) >= 3
        macs, errors = [row["macs"] for row in rows], [row["relative_error"] for row in rows]
        assert macs == sorted(macs)
        assert max(macs) < found["macs"]
        assert errors[-1] < errors[0] <= 1
    page = (tmp_path / "errors.html").read_text()
    assert all(f'"{name}"' in page for name in FORMATS.keys() - {"svd"})


@pytest.mark.slow
def test_a_space_gives_the_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.yaml").write_text("model: {name: digits-cnn}\ndata: {calibration_images: 64}\n")
    found = decompose(
        capsys, "--model", tmp_path / "space.yaml", "--layer", "block1.conv1", "--format", "cp", "--rank", "4"
    )
    assert found["kind"] == "activation-aware"
    assert 0 < found["chosen"]["relative_error"] < 1
    assert found["chosen"]["degeneracy"] > 0
    code, out, err = run(
        capsys, "decompose", "--model", tmp_path / "space.yaml", "--layer", "block1.conv1", "--format", "cp",
        "--rank", "4", "--plot", tmp_path / "errors.png", "--stabilise", "none",
    )  # fmt: skip
    assert not code, err
    assert "activation-aware" in out
    with Image.open(tmp_path / "errors.png") as picture:
        assert picture.size == (1600, 1000)


def test_of_groups_the_error_is_in_the_metric_of_their_inputs_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = GroupedNet().requires_grad_(False)
    save_file(net.state_dict(), tmp_path / "dense.safetensors")
    (tmp_path / "space.yaml").write_text(
        "model: {name: 'tests.networks:GroupedNet', weights: dense.safetensors}\ndata: {calibration_images: 64}\n"
    )
    found = decompose(
        capsys, "--model", tmp_path / "space.yaml", "--layer", "grouped", "--format", "spatial-svd", "--rank", "3"
    )
    assert found["kind"] == "activation-aware"
    data = load_data(DataSpec(calibration_images=64), cache=tmp_path, seed=0)
    hidden = torch.relu(net.stem(to_input(data.calibration, data))).double().numpy()
    kernel = net.grouped.weight.double().numpy()
    lost = whole = 0.0
    for own, x in zip(np.split(kernel, 2), np.split(hidden, 2, axis=1), strict=True):
        rows = x.transpose(0, 2, 3, 1).reshape(-1, 4)
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
        whitened = np.einsum("tskl,sr->trkl", own, vectors * np.sqrt(values))
        energies = np.linalg.svd(whitened.transpose(1, 2, 0, 3).reshape(12, 15), compute_uv=False) ** 2
        lost, whole = lost + energies[3:].sum(), whole + energies.sum()
    assert found["chosen"]["relative_error"] == pytest.approx(lost / whole, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--layer", "layer9"], "found 'layer9'"),
        (["--layer", "conv1", "--format", "cpd", "--rank", "3"], "'cpd'"),
        (["--layer", "conv1", "--format", "svd", "--rank", "3"], "1x1"),
        (["--layer", "conv1", "--format", "tucker2", "--rank", "3"], "2 integers from 1 to (3, 16)"),
        (["--layer", "conv1", "--format", "tucker2", "--rank", "3,99"], "(3, 16)"),
        (["--layer", "conv1", "--format", "tucker2", "--rank", "a,b"], "whole numbers"),
        (["--layer", "conv1", "--format", "tucker2"], "go together"),
        (["--layer", "conv1", "--plot", "errors.pdf"], ".html or .png"),
        (["--layer", "conv1", "--stabilise", "magic"], "epc, norms, bounded or none"),
        (["--layer", "conv1", "--input", "32x32"], "channels x height x width"),
    ],
)
def test_mistakes_are_told(weights: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "decompose", "--model", "resnet20", "--weights", weights, *arguments)
    assert code == 2
    assert told in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_missing_weights_and_sizes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "decompose", "--model", "resnet20", "--layer", "conv1")
    assert code == 2
    assert "--weights" in err
    torch.save({}, tmp_path / "none.pt")
    code, _, err = run(
        capsys, "decompose", "--model", "torch.nn:Identity", "--weights", tmp_path / "none.pt", "--layer", "x"
    )
    assert code == 2
    assert "--input" in err
