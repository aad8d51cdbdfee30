"""How long a wide network takes in int8 and in float32, in ONNX Runtime and inductor, dense and compressed; Markdown.

Run from the root of the repository: ``python -m benchmarks.int8_latency``, on an otherwise idle machine. ResNet-18 at
224 x 224 with random weights, calibrated on random images: latencies depend on neither, accuracies are not asked for.
Dense, and in uniform Tucker-2 and spatial SVD at no more than half of the MACs, ranks in multiples of eight, each
written as ``ranksearch apply --to`` ``onnx``, ``onnx-int8``, ``pt2`` and ``pt2-int8`` do; files of torch run compiled,
with freezing. One thread; files run in turn, the fastest counts.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from benchmarks.common import machine
from benchmarks.int8_export import WRITTEN, fastest, runner
from benchmarks.latency_prediction import table_of
from ranksearch.deployment import TARGETS, deploy
from ranksearch.factors import threads
from ranksearch.models.resnet import resnet18
from ranksearch.rankmap import RankMap
from ranksearch.strategies.uniform import Uniform
from ranksearch.table import LayerPrices, PriceTable
from tests.tables import rank_map as map_with

SHAPE = (3, 224, 224)
SHARE, IMAGES = 0.5, 64
FORMS = ("tucker2", "spatial-svd")
RUNS = {1: 30, 16: 6}
"""Images at a time to runs that are timed."""
GAINS = ("ONNX Runtime, float32 / int8", "inductor, float32 / int8", "fastest dense float32 / fastest int8")


def noise(folder: Path) -> Path:
    """A search space whose images are random."""
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        images = generator.integers(0, 256, (2 * IMAGES, *SHAPE[1:], SHAPE[0]), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=generator.integers(0, 1000, len(images)))
    splits = dict.fromkeys(("calibration_images", "search_images", "report_images"), IMAGES)
    data = {"source": "npz", "root": str(folder), "train": ["train.npz"], "validation": ["validation.npz"], **splits}
    data |= {"mean": [0.5] * SHAPE[0], "std": [0.25] * SHAPE[0]}
    file = folder / "noise.yaml"
    file.write_text(yaml.safe_dump({"model": {"name": "resnet18"}, "data": data}), encoding="utf-8")
    return file


def in_format(layer: LayerPrices, form: str) -> LayerPrices:
    """A layer with candidates of one format alone."""
    return replace(layer, candidates=tuple(c for c in layer.candidates if c.dense or c.format == form))


def map_of(table: PriceTable, form: str | None) -> RankMap:
    """Uniform ranks of one format within ``SHARE`` of the MACs; dense for None."""
    choices = table.dense
    if form is not None:
        own = replace(table, layers=tuple(in_format(layer, form) for layer in table.layers))
        table, choices = own, max((m for m in Uniform().maps(own) if own.macs_ratio(m) <= SHARE), key=own.macs)
    return map_with(table, choices, "resnet18", SHAPE)


def written(rank_map: RankMap, model: nn.Module, images: Path, folder: Path) -> list[Path]:
    """The files, in the order of ``WRITTEN``."""
    stored, dense = folder / "map.json", folder / "dense.safetensors"
    rank_map.save(stored)
    save_file(model.state_dict(), dense)
    files = [folder / f"{to}{TARGETS[to].suffix}" for to in WRITTEN]
    for file, to in zip(files, WRITTEN, strict=True):
        source = str(images) if to.endswith("int8") else "noise"
        deploy(stored, file, to=to, images=source, model="resnet18", weights=dense, storage=folder)
    return files


def main() -> None:
    """Write, time and print."""
    torch.manual_seed(0)
    model = resnet18().eval()
    table = table_of(model, SHAPE, 8)
    print("# Int8 in a wide network\n")
    print("`python -m benchmarks.int8_latency` says in its first lines what is timed: ResNet-18 at 224, one thread.\n")
    head = ["network", "MACs", "images", *(f"{words}, ms" for words in WRITTEN.values()), *GAINS]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    base: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as name, threads(1):
        images = noise(Path(name))
        for form in (None, *FORMS):
            folder = Path(name) / (form or "dense")
            folder.mkdir()
            rank_map = map_of(table, form)
            running = [runner(file) for file in written(rank_map, model, images, folder)]
            for batch, runs in RUNS.items():
                taken = fastest(running, SHAPE, batch, runs)
                dense = base.setdefault(batch, taken)
                row = [form or "dense", f"{rank_map.macs / rank_map.dense_macs:.3f}", str(batch)]
                row += [*(f"{ms:.1f}" for ms in taken)]
                gains = taken[0] / taken[1], taken[2] / taken[3], min(dense[::2]) / min(taken[1::2])
                row += [*(f"{gain:.2f}" for gain in gains)]
                print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{machine(onnxruntime=onnxruntime.__version__)}")


if __name__ == "__main__":
    main()
