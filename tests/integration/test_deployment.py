"""Exported networks: read back by what runs them, described by a manifest, and refused where they are not the same."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.cli import main
from ranksearch.deployment import TARGETS, deploy
from ranksearch.deployment.target import Job
from ranksearch.errors import ExportError
from ranksearch.export import save_compressed
from ranksearch.models import build_model
from ranksearch.rankmap import RankMap
from ranksearch.space import ModelSpec
from ranksearch.surgery import apply_rank_map
from tests.maps import rank_map_for
from tests.networks import SmallNet, small_images

SMALL = {
    "body.plain": ("tensor-chain", (2, 2, 2)),
    "body.strided": ("tucker2", (3, 4)),
    "body.grouped": ("spatial-svd", (3,)),
    "body.point": ("svd", (9,)),
    "tokens": ("svd", (3,)),
}
SUFFIXES = {name: target.suffix for name, target in TARGETS.items()}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Compressed weights of a small network, with their map inside, and that network."""
    name = "tests.networks:SmallNet"
    dense = build_model(ModelSpec(name=name), weights=None)
    with torch.no_grad():
        dense.get_buffer("norm.running_mean").uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    rank_map = rank_map_for(name, dense, SmallNet.shape, SMALL)
    network = apply_rank_map(rank_map, dense).eval()
    file = tmp_path / "compressed.safetensors"
    save_compressed(network.state_dict(), rank_map, file)
    return file, network


def outputs_of(to: str, file: Path, images: Tensor) -> Tensor:
    """What an exported file gives, run without ranksearch."""
    if to == "onnx":
        onnx.checker.check_model(str(file), full_check=True)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if to == "pt2":
        found: Tensor = torch.export.load(file).module()(images)
        return found
    np.save(file.with_suffix(".npy"), images.numpy())
    script = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('ranksearch', 'safetensors', 'tensorly'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import numpy, torch, exported\n"
        "with torch.no_grad():\n"
        "    y = exported.load()(torch.from_numpy(numpy.load(sys.argv[1] + '/exported.npy')))\n"
        "numpy.save(sys.argv[1] + '/outputs.npy', y.numpy())\n"
    )
    command = [sys.executable, "-I", "-c", script, str(file.parent)]
    subprocess.run(command, check=True, timeout=120, cwd=file.parent)
    return torch.from_numpy(np.load(file.parent / "outputs.npy"))


@pytest.mark.parametrize("to", ["pt2", "python", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_export_runs_by_itself(to: str, stored: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file, network = stored
    target = tmp_path / "exports" / f"exported{SUFFIXES[to]}"
    target.parent.mkdir()
    found = deploy(file, target, to=to, images="noise", trust=True)
    images = small_images(5)
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(to, target, images), network(images), rtol=1e-5, atol=1e-5)

    manifest = json.loads(found.manifest.read_text())
    assert {*manifest["files"], found.manifest.name} <= {path.name for path in target.parent.iterdir()}
    for name, described in manifest["files"].items():
        content = (target.parent / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (described["sha256"], described["bytes"])
    assert manifest["comparison"]["top1_agreement"] == 1.0
    assert 0 < manifest["comparison"]["max_difference"] < 1e-4
    assert manifest["batch_norms_folded"] == manifest["pointwise_merged"] == 1
    # At rank 9 the two factors of the 1x1 layer from 12 to 10 channels cost more than it does itself.
    assert manifest["macs"] == found.rank_map.macs - 5 * 5 * (9 * (12 + 10) - 12 * 10)
    assert manifest["versions"]["torch"] == torch.__version__
    assert RankMap.model_validate(manifest["rank_map"]).layers == found.rank_map.layers


def test_safetensors_carry_the_map_and_the_very_weights(stored: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file, _ = stored
    target = tmp_path / "again.safetensors"
    found = deploy(file, target, to="safetensors", images="noise", trust=True)
    assert target.read_bytes() == file.read_bytes()
    assert found.agreement.max_difference == 0.0


def test_a_map_without_weights_is_decomposed_first(tmp_path: Path) -> None:
    dense = build_model(ModelSpec(name="tests.networks:SmallNet"), weights=None)
    weights, bare = tmp_path / "dense.safetensors", tmp_path / "bare.json"
    save_file(dense.state_dict(), weights)
    rank_map_for("tests.networks:SmallNet", dense, SmallNet.shape, SMALL).save(bare)
    found = deploy(bare, tmp_path / "fresh.pt2", to="pt2", images="noise", trust=True, weights=weights)
    assert found.rank_map.provenance["applied_afresh"] == "weight-only"


def test_dense_weights_are_refused_where_stored_ones_are_exported(
    stored: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    weights, before = tmp_path / "dense.safetensors", {stored[0]}
    with pytest.raises(ExportError, match=r"dense.safetensors would not be used. Give --data or --model too"):
        deploy(stored[0], tmp_path / "new.pt2", to="pt2", images="noise", trust=True, weights=weights)
    assert set(tmp_path.iterdir()) == before


def test_versions_are_those_of_modules_whatever_they_were_installed_from(
    stored: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    needing = dataclasses.replace(TARGETS["safetensors"], packages=("onnxruntime",))
    monkeypatch.setitem(TARGETS, "safetensors", needing)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    found = deploy(stored[0], tmp_path / "new.safetensors", to="safetensors", images="noise", trust=True)
    assert json.loads(found.manifest.read_text())["versions"]["onnxruntime"] == onnxruntime.__version__


def test_a_python_module_imports_torch_alone_and_states_its_own_costs(
    stored: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "network.py"
    with pytest.raises(SystemExit) as ended:
        main(["apply", str(stored[0]), "--to", "python", "-o", str(target), "--images", "noise", "--trust"])
    out, err = capsys.readouterr()
    assert ended.value.code in (0, None), err
    manifest = json.loads((tmp_path / "network.py.manifest.json").read_text())
    assert manifest["macs"] < manifest["rank_map"]["macs"], "nothing was merged"
    assert f"{manifest['macs']:,} MACs" in out
    share = 100 * manifest["macs"] / manifest["dense_macs"]
    text = target.read_text()
    assert f"{manifest['macs']:,} MACs per image" in text
    assert f"to {share:.1f} % of its MACs" in text
    imported = set()
    for node in ast.walk(ast.parse(target.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported == {"torch"}


class Odd(nn.Module):
    """Whatever else a graph can hold: sizes, tensors in no layer, shared and transposed layers, slices, concatenation.

    One of its layers would be named `zero_grad`, as is a method of every module.
    """

    shape = (2, 7, 6)

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.ModuleDict({"grad": nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")})
        self.before = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.shared = nn.Conv2d(6, 6, 1, bias=False)
        self.volume = nn.Conv3d(1, 2, 2, bias=False)
        self.line = nn.Conv1d(20, 4, 3, dilation=2)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.5]))
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(F.relu(self.zero["grad"](x))))
        x = self.shared(F.hardtanh(self.shared(self.up(x))))[:, 1:, ::2]
        volume = self.volume(x.unsqueeze(1)).masked_fill(self.mask.view(1, 2, 1, 1, 1), -float("inf"))
        x = torch.cat([x[:, :4, :6, :11].flatten(1, 2), volume.clamp(-1, 1).sum(2).flatten(1, 2)[:, :-4, :]], 1)
        x = self.line(x[:, :20])
        first, second = F.max_pool1d(x, 2).reshape(x.shape[0], -1, 2).unbind(-1)
        return torch.softmax(first * self.scale[0] + second * self.scale[1] * torch.full((1,), 2.0), 1)


def test_any_graph_is_written_as_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Odd().eval()
    rank_map = rank_map_for("odd", network, Odd.shape, {})
    job = Job(rank_map=rank_map, network=network, structure=network)
    file = tmp_path / "exported.py"
    TARGETS["python"].write(job, file)
    images = torch.randn(3, *Odd.shape, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    again = TARGETS["python"].read(job, file)
    assert torch.equal(torch.random.get_rng_state(), before), "reading it drew random numbers"
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs_of("python", file, images[:1]), network(images[:1]), rtol=1e-5, atol=1e-6)


class Chancy(SmallNet):
    """It drops activations in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class Branching(SmallNet):
    """What it does depends on the images' values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


class Counting(SmallNet):
    """It works for two images only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).expand(2, 4) if len(x) == 2 else super().forward(x)


class Telling(SmallNet):
    """It gives more than outputs."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Diverged(SmallNet):
    """Its outputs are no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(
    ("network", "to", "message"),
    [
        ("Chancy", "pt2", "read back, differs by up to"),
        ("Chancy", "safetensors", "read back, differs by up to"),
        ("Diverged", "python", "read back, differs by up to inf"),
        ("Branching", "pt2", "must be one graph"),
        ("Branching", "python", "must be one graph"),
        ("Counting", "pt2", "must be one graph"),
        ("Telling", "pt2", "must give one tensor"),
    ],
)
def test_a_bad_export_is_refused_and_leaves_nothing(network: str, to: str, message: str, tmp_path: Path) -> None:
    name = f"tests.integration.test_deployment:{network}"
    dense = build_model(ModelSpec(name=name), weights=None)
    rank_map = rank_map_for(name, dense, SmallNet.shape, {"body.strided": ("tucker2", (3, 4))})
    file = tmp_path / "compressed.safetensors"
    save_compressed(apply_rank_map(rank_map, dense).state_dict(), rank_map, file)
    with pytest.raises(ExportError, match=message):
        deploy(file, tmp_path / f"bad{SUFFIXES[to]}", to=to, images="noise", trust=True)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("tflite", "net.tflite", "exported to one of safetensors, pt2, pt2-int8, onnx, onnx-int8, python"),
        ("onnx", "net.pt2", r"must end in \.onnx"),
        ("onnx-int8", "net.onnx", "calibrated on images"),
        ("python", "my-net.py", "the name of one"),
        ("pt2", "nowhere/net.pt2", "a folder that exists"),
    ],
)
def test_wrong_names_are_refused(
    to: str, name: str, message: str, stored: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=message):
        deploy(stored[0], tmp_path / name, to=to, images="noise", trust=True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resnet20_agrees_on_all_real_images(real_data: Path, tmp_path: Path) -> None:
    """Every format, on the 5,000 validation images, with activation-aware factors at about half of the MACs."""
    weights = real_data / "resnet20-cifar10.safetensors"
    dense = build_model(ModelSpec(name="resnet20"), weights=weights)
    shape = (3, 32, 32)
    ranks: dict[str, tuple[str, tuple[int, ...]]] = {
        f"layer{stage}.{block}.conv{i}": ("tucker2", (10 * 2 ** (stage - 1), 10 * 2 ** (stage - 1)))
        for stage in (2, 3)
        for block in (1, 2)
        for i in (1, 2)
    }
    recorded = {
        "source": "npz",
        "root": str(real_data),
        "train": ["cifar10-train-0.npz"],
        "validation": ["cifar10-val.npz"],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    bare, aware = tmp_path / "bare.json", tmp_path / "aware.safetensors"
    rank_map_for("resnet20", dense, shape, ranks, provenance={"data": recorded}).save(bare)
    deploy(bare, aware, to="safetensors", weights=weights, data="recorded")
    half = deploy(aware, tmp_path / "int8.onnx", to="onnx-int8").agreement
    assert half.top1_agreement >= 0.95
    assert half.accuracy == pytest.approx(half.accuracy_before, abs=0.005)
    kernels = [one for one in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(one.dims) == 4]
    assert {one.data_type for one in kernels} == {onnx.TensorProto.INT8}
    accuracies = set()
    for to in ("pt2", "onnx", "python"):
        found = deploy(aware, tmp_path / f"network{SUFFIXES[to]}", to=to).agreement
        assert (found.images, found.source, found.top1_agreement) == (5000, "recorded", 1.0)
        assert found.max_difference < 1e-4
        accuracies.add(found.accuracy)
    assert len(accuracies) == 1
    assert accuracies.pop() > 0.85  # type: ignore[operator]
