"""ONNX of a rank map with widths: the very whole numbers of the search, computed with in int8 by ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from ranksearch.deployment import TARGETS, deploy
from ranksearch.deployment.target import Job
from ranksearch.errors import ExportError
from ranksearch.rankmap import RankMap, WidthsRecord
from ranksearch.rounding import whole_numbers
from ranksearch.stages import TiedConv
from tests.networks import small_images
from tests.whole import FOUR, PARTLY, Tied, calibrated, close, job_of, running_twice, searched, simulated, small, turned

pytestmark = pytest.mark.xdist_group("whole_numbers")  # by one worker: what its tests share is made once


def exact_sums() -> Any:
    """Options as the README tells them: on x86 without VNNI, sums of products of int8 would overflow their 16 bits."""
    options: Any = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def optimised(file: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a file as it loads it."""
    options = exact_sums()
    options.optimized_model_filepath = str(file.with_suffix(".optimised"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return onnx.load(file.with_suffix(".optimised"))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(file: Path, images: Tensor, *, as_written: bool = False) -> Tensor:
    """Outputs in ONNX Runtime; ``as_written`` node by node, in float32."""
    onnx.checker.check_model(str(file), full_check=True)
    options = exact_sums()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def weights_in(file: Path) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Layer to the ONNX type of its weights, the whole numbers and their steps."""
    held = {one.name: one for one in onnx.load(file).graph.initializer}
    ends = ".weight_quantized"
    return {
        name.removesuffix(ends): (
            one.data_type,
            numpy_helper.to_array(one).astype(np.int64),
            numpy_helper.to_array(held[name.replace("quantized", "scale")]),
        )
        for name, one in held.items()
        if name.endswith(ends)
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankMap]:
    return searched(tmp_path_factory.mktemp("few"))


def test_a_search_ends_in_its_own_whole_numbers(exported: tuple[Path, RankMap], tmp_path: Path) -> None:
    file, rank_map = exported
    target = tmp_path / "few.onnx"
    found = deploy(file, target, to="onnx-int8", storage=file.parent)
    state = load_file(file.parent / "w.safetensors")
    held = weights_in(target)
    assert set(held) == {name.removesuffix(".weight") for name, x in state.items() if x.ndim > 1}
    for name, (kind, whole, step) in held.items():
        owner = rank_map.layers.get(name.rpartition(".")[0])
        bits = 8 if owner is None else owner.bits
        assert kind == (onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8)
        assert np.abs(whole).max() <= 2 ** (bits - 1) - 1
        kernel = state[f"{name}.weight"].numpy().astype(np.float64).reshape(len(step), -1)
        rows = whole.reshape(len(step), -1)
        # A batch norm that was folded in is one factor a channel, of either sign.
        factor = (kernel * rows).sum(1) / np.maximum((rows * rows).sum(1), 1)
        np.testing.assert_allclose(factor[:, None] * rows, kernel, rtol=3e-7, atol=1e-12)
    manifest = json.loads(found.manifest.read_text())
    assert manifest["whole_numbers"] is True
    assert manifest["pointwise_merged"] == 0
    assert found.agreement.top1_agreement >= 0.98
    assert found.agreement.accuracy == pytest.approx(found.agreement.accuracy_before, abs=0.01)
    kinds = operators(optimised(target))
    assert kinds["Conv"] == kinds["ConvInteger"] == kinds["Gemm"] == kinds["MatMul"] == 0
    assert kinds["QLinearConv"] + kinds["QGemm"] == len(held)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    network, rank_map = small()
    job = job_of(network, rank_map, small_images(64))
    file = tmp_path_factory.mktemp("written") / "x.onnx"
    TARGETS["onnx-int8"].write(job, file)
    return file, job


def test_ranges_are_those_of_the_simulation(written: tuple[Path, Job]) -> None:
    file, job = written
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    assert job.ranges
    for name, known in job.ranges.items():
        if f"{name}.input_scale" in held:  # else another layer takes the same tensor
            assert held[f"{name}.input_scale"] == np.float32(known.scale)
            assert held[f"{name}.input_zero_point"] == known.zero_point
    assert sum(name.endswith(".input_scale") for name in held) >= len(job.ranges) - 1
    images = small_images(200, seed=7)
    with torch.no_grad():
        plain = job.network(images)
    assert close(run(file, images), simulated(job.network, job, images), plain)
    assert b"ranksearch/" not in file.read_bytes(), "lines of source beside the nodes"


def test_four_bits_take_half_a_byte(written: tuple[Path, Job]) -> None:
    file, job = written
    packed = [one for one in onnx.load(file).graph.initializer if one.data_type == onnx.TensorProto.INT4]
    halves = {
        f"{name}.weight_quantized": -(-module.weight.numel() // 2)
        for name, module in job.network.named_modules()
        if name.rpartition(".")[0] in FOUR and isinstance(module, nn.Conv2d | nn.Linear)
    }
    count = {one.name: len(one.raw_data) for one in packed if one.name.endswith("weight_quantized")}
    assert count == halves
    assert len(count) == 5


def test_all_convolutions_run_in_int8(written: tuple[Path, Job]) -> None:
    """Strided, dilated, grouped, depthwise, tied, behind a skip: all but linear layers on tokens."""
    file, job = written
    assert (job.folded.norms, job.folded.merged) == (1, 0), "a product of two kernels is not rounded"
    kinds = operators(optimised(file))
    assert kinds["Conv"] == 0
    assert kinds["QLinearConv"] == sum(isinstance(module, nn.Conv2d | TiedConv) for module in job.network.modules())


def test_a_bias_beyond_32_bits_is_added_apart(tmp_path: Path) -> None:
    """A batch norm all but switches a channel off, and leaves its bias."""
    network, rank_map = small()
    with torch.no_grad():
        network.get_parameter("norm.weight")[0] = 1e-12
        network.get_parameter("norm.bias")[0] = 0.7
    images = small_images(64)
    job = job_of(network, rank_map, images)
    TARGETS["onnx-int8"].write(job, tmp_path / "x.onnx")
    with torch.no_grad():
        plain = network(images)
    assert close(run(tmp_path / "x.onnx", images), simulated(network, job, images), plain)
    assert any(one.name.endswith("bias_apart") for one in onnx.load(tmp_path / "x.onnx").graph.initializer)


@PARTLY
def test_what_stays_in_float32_is_left_so(widths: WidthsRecord, tmp_path: Path) -> None:
    network, rank_map = small(widths)
    images = small_images(64)
    job = job_of(network, rank_map, images)
    TARGETS["onnx-int8"].write(job, tmp_path / "x.onnx")
    held, kinds = weights_in(tmp_path / "x.onnx"), operators(onnx.load(tmp_path / "x.onnx"))
    assert ("stem" in held) == (widths.other_bits == 8)
    assert (kinds["QuantizeLinear"] == 0) == (widths.activation_bits == 32)
    found, wanted = run(tmp_path / "x.onnx", images, as_written=True), simulated(network, job, images)
    if widths.activation_bits == 32:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        with torch.no_grad():
            assert close(found, wanted, network(images))


def test_a_layer_that_runs_more_than_once(tmp_path: Path) -> None:
    job, images = running_twice()
    TARGETS["onnx-int8"].write(job, tmp_path / "x.onnx")
    with torch.no_grad():
        assert close(run(tmp_path / "x.onnx", images), simulated(job.network, job, images), job.network(images))
    assert operators(optimised(tmp_path / "x.onnx"))["QLinearConv"] == 3 + 3 + 1


def test_transposed_convolutions_have_their_channels_along_another_axis(tmp_path: Path) -> None:
    for groups in (1, 2):
        job, images = turned(groups)
        if groups == 2:
            with pytest.raises(ExportError, match=r"transposed convolution up has 2 groups. Use `--to onnx`"):
                TARGETS["onnx-int8"].write(job, tmp_path / "x.onnx")
            continue
        TARGETS["onnx-int8"].write(job, tmp_path / "x.onnx")
        with torch.no_grad():
            assert close(run(tmp_path / "x.onnx", images), simulated(job.network, job, images), job.network(images))


WHOLE = pytest.mark.parametrize("to", ["onnx-int8", "pt2-int8"])


@WHOLE
def test_weights_that_are_not_whole_are_refused(to: str, tmp_path: Path) -> None:
    network, rank_map = small()
    with torch.no_grad():
        network.get_parameter("body.depthwise.weight")[3] += torch.linspace(0, 0.1, 9).reshape(1, 3, 3)
    with pytest.raises(
        ExportError, match=r"weights of 8 bits must be whole multiples .* those of body.depthwise are not"
    ):
        TARGETS[to].write(job_of(network, rank_map, small_images(64)), tmp_path / "x")


@WHOLE
def test_layers_that_share_their_weights_are_refused(to: str, tmp_path: Path) -> None:
    job, _ = calibrated("tied", Tied(), (4, 6, 6), {"head": ("svd", (2,))})
    with pytest.raises(ExportError, match=r"weights .* must stand in the graph .* (first|second) has none there"):
        TARGETS[to].write(job, tmp_path / "x")


@WHOLE
def test_noise_gives_no_ranges(to: str, exported: tuple[Path, RankMap], tmp_path: Path) -> None:
    file = tmp_path / f"x{TARGETS[to].suffix}"
    with pytest.raises(ExportError, match="calibrated on images"):
        deploy(exported[0], file, to=to, images="noise", storage=exported[0].parent)
    assert not list(tmp_path.iterdir())


def test_a_map_without_widths_goes_to_the_runtimes_own_quantiser(
    exported: tuple[Path, RankMap], tmp_path: Path
) -> None:
    file, rank_map = exported
    plain = file.parent / "plain.json"
    rank_map.model_copy(update={"widths": None}).save(plain)
    found = deploy(plain, tmp_path / "x.onnx", to="onnx-int8", storage=file.parent)
    assert json.loads(found.manifest.read_text())["whole_numbers"] is False
    kinds = {one.data_type for one in onnx.load(tmp_path / "x.onnx").graph.initializer}
    assert onnx.TensorProto.INT4 not in kinds
    assert onnx.TensorProto.INT8 in kinds


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_are_found_again(bits: int) -> None:
    generator, most = torch.Generator().manual_seed(0), 2 ** (bits - 1) - 1
    whole = torch.randint(-most, most + 1, (40, 5, 3), generator=generator).to(torch.int8)
    whole[0], whole[1] = 0, 3 * (whole[1] // 3)  # a dead channel, and one that a coarser step explains
    whole[2:, 0, 0] = 1
    step = torch.rand(40, generator=generator) * torch.logspace(-6, 3, 40)
    kernel = whole * step[:, None, None]
    found = whole_numbers(kernel, bits)
    assert found is not None
    assert found[0].dtype == torch.int8
    assert torch.equal(found[0][2:], whole[2:])
    torch.testing.assert_close(found[0] * found[1][:, None, None], kernel, rtol=2e-7, atol=0)
    kernel[5, 0, 0] += 0.3 * step[5]
    assert whole_numbers(kernel, bits) is None
