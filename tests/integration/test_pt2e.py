"""torch.export archives in int8: the whole numbers of a rank map, in torch alone, with int8 kernels once compiled."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ranksearch.deployment import TARGETS, deploy
from ranksearch.deployment.target import Job
from ranksearch.errors import ExportError
from ranksearch.rankmap import RankMap, WidthsRecord
from ranksearch.stages import TiedConv
from tests.networks import small_images
from tests.whole import FOUR, PARTLY, calibrated, close, job_of, running_twice, searched, simulated, small, turned

pytestmark = pytest.mark.xdist_group("pt2e")  # by one worker: what its tests share is made once

TO = "pt2-int8"
COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="needs a C++ compiler: torch.compile makes kernels with it",
)
VNNI = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI: without, sums of products of int8 overflow"
)
ALONE = """
import sys, torch, torch.ao.quantization.fx._decomposed
assert not {"ranksearch", "torchao"} & set(sys.modules)
images, wanted = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(images)
assert torch.equal(found, wanted), (found - wanted).abs().max()
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankMap]:
    return searched(tmp_path_factory.mktemp("few"))


def written(job: Job, folder: Path) -> Path:
    TARGETS[TO].write(job, folder / "x.pt2")
    return folder / "x.pt2"


def run(file: Path, images: Tensor) -> Tensor:
    """Outputs operator by operator, in float32."""
    with torch.no_grad():
        return torch.export.load(file).module()(images)  # type: ignore[no-any-return]


def weights_in(file: Path) -> list[Tensor]:
    """The whole numbers in the graph."""
    program = torch.export.load(file)
    held = [*program.state_dict.values(), *program.constants.values()]
    return [one for one in held if isinstance(one, Tensor) and one.dtype == torch.int8]


def kernels_in(file: Path) -> list[Tensor]:
    """The weights of layers in float32."""
    return [one for one in torch.export.load(file).state_dict.values() if one.ndim > 1 and one.is_floating_point()]


def roundings(file: Path) -> list[tuple[float, int]]:
    """Scale and zero point of everything that is rounded as the network runs."""
    nodes = torch.export.load(file).graph.nodes
    return [
        n.args[1:3] for n in nodes if "quantize_per_tensor.default" in str(n.target) and "dequ" not in str(n.target)
    ]


@COMPILER
def test_a_search_ends_in_its_own_whole_numbers(exported: tuple[Path, RankMap], tmp_path: Path) -> None:
    file, rank_map = exported
    target = tmp_path / "few.pt2"
    found = deploy(file, target, to=TO, storage=file.parent)
    manifest = json.loads(found.manifest.read_text())
    assert manifest["whole_numbers"] is True
    assert set(manifest["versions"]) >= {"torch", "torchao"}
    assert found.agreement.top1_agreement >= 0.99
    assert found.agreement.accuracy == pytest.approx(found.agreement.accuracy_before, abs=0.005)
    state = {n: x for n, x in load_file(file.parent / "w.safetensors").items() if x.ndim > 1}
    held = weights_in(target)
    assert len(held) == len(state) - 1  # the images have one channel: the first factor computes in float32
    left = {n: x.double().flatten(1) for n, x in state.items()}
    for whole in held:
        rows = whole.double().flatten(1)

        def same(kernel: Tensor, rows: Tensor = rows) -> bool:
            if kernel.shape != rows.shape:
                return False
            # A batch norm that was folded in is one factor a channel, of either sign.
            factor = (kernel * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True).clamp_min(1)
            return torch.allclose(factor * rows, kernel, rtol=3e-7, atol=1e-12)

        owners = [name for name, kernel in left.items() if same(kernel)]
        assert owners, "no layer has these weights"
        layer = rank_map.layers.get(owners[0].removesuffix(".weight").rpartition(".")[0])
        assert int(whole.abs().max()) <= 2 ** ((8 if layer is None else layer.bits) - 1) - 1
        del left[owners[0]]


def test_it_rounds_where_and_as_the_simulation_does(tmp_path: Path) -> None:
    network, rank_map = small()
    images = small_images(64)
    job = job_of(network, rank_map, images)
    file = written(job, tmp_path)
    known = {(float(np.float32(one.scale)), one.zero_point) for one in (job.ranges or {}).values()}
    assert known == set(roundings(file))
    others = small_images(200, seed=7)
    with torch.no_grad():
        plain = network(others)
    wanted = simulated(network, job, others)
    assert close(run(file, others), wanted, plain)
    # Rounding is not continuous: a last digit moves some values across; of most images none.
    apart = (run(file, others) - wanted).abs().amax(1)
    assert float((apart < 1e-5).double().mean()) > 0.5
    weights = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | TiedConv)]
    assert len(weights_in(file)) == len(weights)
    assert not kernels_in(file)
    fours = [n for n, m in network.named_modules() if n.rpartition(".")[0] in FOUR and hasattr(m, "weight")]
    assert sum(int(one.abs().max()) <= 7 for one in weights_in(file)) == len(fours)


def test_the_file_names_no_paths(tmp_path: Path) -> None:
    network, rank_map = small()
    job = job_of(network, rank_map, small_images(64))
    for to in ("pt2", TO):
        TARGETS[to].write(job, tmp_path / f"{to}.pt2")
        with zipfile.ZipFile(tmp_path / f"{to}.pt2") as archive:
            text = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
        assert b"conv2d" in text
        assert not re.search(rb"ranksearch[/\\]|site-packages", text), "lines of source beside the nodes"


def test_it_runs_where_only_torch_is(tmp_path: Path) -> None:
    network, rank_map = small()
    images = small_images(64)
    file = written(job_of(network, rank_map, images), tmp_path)
    torch.save((images, run(file, images)), tmp_path / "x.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, file, tmp_path / "x.pt"], check=True, timeout=300)


@COMPILER
@VNNI
@pytest.mark.slow
def test_compiled_it_computes_in_int8(tmp_path: Path) -> None:
    """Strided, dilated, grouped, depthwise, tied, behind a skip, and linear layers: all have kernels in int8."""
    network, rank_map = small()
    images = small_images(64)
    job = job_of(network, rank_map, images)
    file = written(job, tmp_path)
    compiled = TARGETS[TO].read(job, file)
    found = compiled(images)
    with torch.no_grad():
        assert close(found, simulated(network, job, images), network(images))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        compiled(images)
    ran = {event.key: event.count for event in profiled.key_averages()}
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | TiedConv)]
    products = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert ran["onednn::qconv_pointwise"] == len(layers)
    assert sum(n for key, n in ran.items() if key.startswith("onednn::qlinear")) == len(products)
    assert not any("mkldnn_convolution" in key or key in ("aten::convolution", "aten::addmm") for key in ran)


@PARTLY
def test_what_stays_in_float32_is_left_so(widths: WidthsRecord, tmp_path: Path) -> None:
    network, rank_map = small(widths)
    images = small_images(64)
    job = job_of(network, rank_map, images)
    file = written(job, tmp_path)
    found, wanted = run(file, images), simulated(network, job, images)
    assert (not roundings(file)) == (widths.activation_bits == 32)
    rounded = sum(m.weight.ndim > 1 for m in network.modules() if isinstance(getattr(m, "weight", None), Tensor))
    assert (len(weights_in(file)) == rounded) == (widths.other_bits == 8)
    if widths.activation_bits == 32:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        with torch.no_grad():
            assert close(found, wanted, network(images))


def test_a_layer_that_runs_more_than_once(tmp_path: Path) -> None:
    job, images = running_twice()
    with torch.no_grad():
        assert close(run(written(job, tmp_path), images), simulated(job.network, job, images), job.network(images))


@COMPILER
@VNNI
@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_compute_in_float32(groups: int, tmp_path: Path) -> None:
    """With rounded inputs and rounded weights; the compiler would run one as a plain convolution."""
    job, images = turned(groups)
    file = written(job, tmp_path)
    assert (len(weights_in(file)), len(kernels_in(file))) == (3, 1)
    with torch.no_grad():
        for found in (run(file, images), TARGETS[TO].read(job, file)(images)):
            assert close(found, simulated(job.network, job, images), job.network(images))


class Branching(nn.Module):
    """A norm that cannot be folded: what goes into it goes on beside it, too; and one that has its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.norm, self.act = nn.BatchNorm2d(6), NormAct(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(torch.relu(self.norm(x)))
        found: Tensor = self.act(self.third(x)).mean((2, 3))
        return found


class NormAct(nn.BatchNorm2d):
    """As some networks have it, with its activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        """Normed, and what is positive of it."""
        return torch.relu(super().forward(x))


def test_norms_that_are_not_folded_stay_beside_their_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = Branching()
    with torch.no_grad():
        for norm in (dense.norm, dense.act):
            for one in (norm.weight, norm.running_var):
                one.uniform_(0.2, 3.0)  # type: ignore[union-attr]
            for one in (norm.bias, norm.running_mean):
                one.normal_()  # type: ignore[union-attr]
    job, images = calibrated("branching", dense, (4, 8, 8), {"second": ("tucker2", (3, 3))})
    assert sum(isinstance(m, nn.BatchNorm2d) for m in job.folded.model.modules()) == 2
    file = written(job, tmp_path)
    assert len(weights_in(file)) == 5
    wanted = simulated(job.network, job, images)
    with torch.no_grad():
        assert close(run(file, images), wanted, job.network(images))
    assert float(((run(file, images) - wanted).abs().amax(1) < 1e-5).double().mean()) > 0.5


class Same(nn.Module):
    """A convolution whose padding has a name, which is an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding="same"), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(x))).mean((2, 3))
        return found


def test_padding_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    job, images = calibrated("same", Same(), (4, 6, 6), {"second": ("tucker2", (3, 3))})
    file = written(job, tmp_path)
    assert len(weights_in(file)) == 4
    with torch.no_grad():
        assert close(run(file, images), simulated(job.network, job, images), job.network(images))


def test_without_torchao_it_says_what_to_install(
    exported: tuple[Path, RankMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "torchao" else real(name, package)

    monkeypatch.setattr("ranksearch.deployment.pt2e.find_spec", without)
    with pytest.raises(ExportError, match=r"needs torchao.*pip install 'ranksearch\[torchao\]'"):
        deploy(exported[0], tmp_path / "x.pt2", to=TO, storage=exported[0].parent)
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_it_says_what_to_install(
    exported: tuple[Path, RankMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with (
        inductor.patch({"cpp.cxx": (None, str(tmp_path / "none"))}),
        pytest.raises(ExportError, match=r"needs a C\+\+ compiler, found none. Install one"),
    ):
        deploy(exported[0], tmp_path / "x.pt2", to=TO, storage=exported[0].parent)
    assert not list(tmp_path.glob("x.*"))


@COMPILER
def test_a_map_without_widths_gets_eight_bits(exported: tuple[Path, RankMap], tmp_path: Path) -> None:
    file, rank_map = exported
    plain = file.parent / "plain.json"
    rank_map.model_copy(update={"widths": None}).save(plain)
    found = deploy(plain, tmp_path / "x.pt2", to=TO, storage=file.parent)
    assert json.loads(found.manifest.read_text())["whole_numbers"] is False
    assert found.agreement.top1_agreement >= 0.95
    assert max(int(one.abs().max()) for one in weights_in(tmp_path / "x.pt2")) > 7
