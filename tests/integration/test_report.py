"""The page of a rank map: its numbers are measured, its words follow from them, and it needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranksearch.cli import main
from ranksearch.data import load_data
from ranksearch.handover import Comparison, Measured
from ranksearch.models import build_model
from ranksearch.rankmap import RankMap
from ranksearch.report import LayerReport, measure_layers, page
from ranksearch.report.page import _batches, expectations
from ranksearch.space import DataSpec, ModelSpec
from ranksearch.surgery import apply_rank_map, find_layers
from tests.maps import rank_map_for
from tests.networks import SmallNet, small_images, small_net

RANKS: dict[str, tuple[str, tuple[int, ...]]] = {"body.strided": ("tucker2", (3, 4)), "tokens": ("svd", (3,))}


@pytest.fixture
def layers() -> list[LayerReport]:
    dense = small_net()
    rank_map = rank_map_for("small", dense, SmallNet.shape, RANKS)
    compressed = apply_rank_map(rank_map, dense).eval()
    return measure_layers(rank_map, dense, compressed, [small_images(8), small_images(8, seed=2)])


def test_every_layer_is_there_with_its_costs(layers: list[LayerReport]) -> None:
    expected = find_layers(small_net(), SmallNet.shape)
    assert [(one.name, one.dense_macs) for one in layers] == [(layer.name, layer.conv.macs) for layer in expected]
    by_name = {one.name: one for one in layers}
    # Tucker-2 of 8 to 12 channels, 3x3, at ranks 3 and 4: 9x9 pixels in, 5x5 out.
    assert by_name["body.strided"].macs == 81 * 8 * 3 + 25 * (9 * 3 * 4 + 4 * 12)
    assert by_name["body.plain"].error is None
    assert by_name["body.plain"].macs == by_name["body.plain"].dense_macs
    assert all(one.latency_ms > 0 and one.dense_latency_ms > 0 for one in layers)


def test_errors_are_those_of_the_outputs(layers: list[LayerReport]) -> None:
    dense = small_net()
    rank_map = rank_map_for("small", dense, SmallNet.shape, RANKS)
    compressed = apply_rank_map(rank_map, dense).eval()
    images = torch.cat([small_images(8), small_images(8, seed=2)])
    outputs: dict[nn.Module, torch.Tensor] = {}
    inputs: dict[nn.Module, torch.Tensor] = {}
    for model in (dense, compressed):
        module = model.get_submodule("tokens")
        module.register_forward_hook(lambda m, args, y: (inputs.update({m: args[0]}), outputs.update({m: y}))[0])
        with torch.no_grad():
            model(images)
    ours, chain = dense.get_submodule("tokens"), compressed.get_submodule("tokens")
    in_place = torch.linalg.norm(outputs[chain] - outputs[ours]) / torch.linalg.norm(outputs[ours])
    with torch.no_grad():
        alone = torch.linalg.norm(chain(inputs[ours]) - outputs[ours]) / torch.linalg.norm(outputs[ours])
    found = next(one for one in layers if one.name == "tokens")
    assert found.error == pytest.approx(float(alone), rel=1e-5)
    assert found.error_in_place == pytest.approx(float(in_place), rel=1e-5)
    assert found.error != pytest.approx(found.error_in_place, rel=1e-3)


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied of batches of ``images``."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images, self.numbers = images, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default and found.shape[:1] == (self.images,):
            self.numbers += found.numel()
        return found


def test_of_a_batch_only_the_dense_outputs_are_held() -> None:
    dense, images = small_net(), small_images(7)
    rank_map = rank_map_for("small", dense, SmallNet.shape, {"body.strided": ("tucker2", (3, 4))})
    compressed = apply_rank_map(rank_map, dense).eval()
    with Copies(7) as own, torch.no_grad():
        dense(images)
        compressed(images)
    with Copies(7) as copies:
        measure_layers(rank_map, dense, compressed, [images])
    assert copies.numbers - own.numbers == 7 * 12 * 5 * 5


def test_a_page_takes_few_images_at_a_time(tmp_path: Path) -> None:
    data = load_data(
        DataSpec(train_images=64, calibration_images=20, search_images=10, report_images=10), cache=tmp_path, seed=0
    )
    rank_map = rank_map_for("digits-cnn", build_model(ModelSpec(name="digits-cnn"), weights=None), (1, 8, 8), {})
    batches = list(_batches(data, rank_map))
    assert [len(images) for images in batches] == [8, 8, 4]


@pytest.mark.parametrize("epochs", [1, 2, 12, 13, 60])
def test_a_curve_is_shown_from_its_first_epoch_to_its_last(epochs: int, compared: Comparison) -> None:
    curve = [{"epoch": n + 1, "loss": 1.0, "accuracy": 0.5, "accuracy_ema": None} for n in range(epochs)]
    rank_map = compared.rank_map.model_copy(update={"provenance": {"finetune": {"curves": {"compressed": curve}}}})
    section = page(replace(compared, rank_map=rank_map), []).partition("Fine-tuning")[2].partition("</table>")[0]
    shown = [int(found) for found in re.findall(r"<td>compressed</td><td>(\d+)</td>", section)]
    assert (shown[0], shown[-1], len(shown)) == (1, epochs, min(12, epochs))
    gaps = {later - earlier for earlier, later in pairwise(shown)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert 0 not in gaps


def measured(accuracy: float, macs: int, latency_ms: float) -> Measured:
    return Measured(
        accuracy=accuracy, accuracy_low=accuracy - 0.02, accuracy_high=accuracy + 0.02, loss=0.5, images=1000,
        macs=macs, params=macs // 10, latency_ms={1: latency_ms, 64: 10 * latency_ms},
    )  # fmt: skip


@pytest.fixture
def compared() -> Comparison:
    rank_map = rank_map_for("small", small_net(), SmallNet.shape, RANKS)
    return Comparison(
        rank_map=rank_map, dense=measured(0.90, 1000, 3.0), compressed=measured(0.875, 400, 2.0), factors="stored",
        threads=1, same_dense=True,
    )  # fmt: skip


def test_words_follow_from_the_numbers(compared: Comparison, layers: list[LayerReport]) -> None:
    even = [replace(one, latency_ms=1.0, dense_latency_ms=1.0) for one in layers]
    text = " ".join(expectations(compared, even))
    for part in ("87.50 %", "2.50 points fewer", "2.50 times fewer MACs", "1.50 at batch 1, 1.50 at batch 64"):
        assert part in text
    assert "Slower than dense" not in text
    assert "no weights" not in text
    slow = [replace(one, latency_ms=2.0) if one.name == "tokens" else one for one in even]
    other = replace(compared, factors="weight-only", same_dense=False, compressed=measured(0.91, 400, 2.0))
    text = " ".join(expectations(other, slow))
    for part in ("1.00 points more", "Slower than dense, by themselves, are tokens:", "no weights", "are not those"):
        assert part in text


class Reader(HTMLParser):
    """What a page loads, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [f"{tag} {value}" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_loads_nothing(compared: Comparison, layers: list[LayerReport]) -> None:
    strange = compared.rank_map.model.model_copy(update={"name": "<script>alert(1)</script>"})
    rank_map = compared.rank_map.model_copy(update={"model": strange})
    text = page(replace(compared, rank_map=rank_map), layers)
    reader = Reader()
    reader.feed(text)
    assert (reader.open, reader.loaded) == ([], [])
    assert "<script" not in text
    assert "url(" not in text
    assert text.count("<tr") == 1 + 7 + 1 + len(layers) + text.partition("Where it comes from")[2].count("<tr")


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = build_model(ModelSpec(name="digits-cnn"), weights=None)
    weights, file, output = tmp_path / "dense.safetensors", tmp_path / "map.json", tmp_path / "report.html"
    save_file(dense.state_dict(), weights)
    data = DataSpec(train_images=64, calibration_images=64, search_images=100, report_images=200)
    ranks: dict[str, tuple[str, tuple[int, ...]]] = {"block1.conv1": ("tucker2", (8, 8))}
    curve = [{"epoch": 1, "loss": 1.25, "accuracy": 0.5, "accuracy_ema": None}]
    provenance = {"data": data.model_dump(mode="json"), "finetune": {"curves": {"compressed": curve}}, "study": "mine"}
    made: RankMap = rank_map_for("digits-cnn", dense, (1, 8, 8), ranks, provenance=provenance)
    made.save(file)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(file), "--weights", str(weights), "-o", str(output)])
    assert ended.value.code in (0, None), capsys.readouterr().err
    text = output.read_text()
    for part in ("digits-cnn at", "block1.conv1", "tucker2", "8, 8", "1.2500", "mine", "200 report images"):
        assert part in text
    assert len(re.findall(r"latency, batch", text)) == 2
    with pytest.raises(SystemExit) as ended:
        main(["report", str(file), "-o", str(tmp_path / "report.pdf")])
    assert ended.value.code == 2
