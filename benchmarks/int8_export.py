"""ResNet-20 on CIFAR-10 in int8: rank maps with widths as ONNX files of whole numbers, in ONNX Runtime; Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.int8_export``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. The networks are those of ``benchmarks/few_bits.py``: the
knapsack's rank maps at half of the MACs, weights of 8 and 4 bits, activations of 8, nothing trained. Each is written as
``ranksearch apply --to onnx-int8`` and ``--to onnx`` do, and scored on the report images as the search scores it
(simulated), in int8, and in float32 (the same rounded weights, activations as they are). Latencies are the time that
the one thread has the processor, which other work beside it lengthens little; files run in turn, the fastest counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from benchmarks.few_bits import FORMATS, dearest, evaluator
from ranksearch.data import to_input
from ranksearch.deployment import deploy
from ranksearch.evaluation import Evaluator, layers_of
from ranksearch.export import save_compressed
from ranksearch.preparation import versions
from ranksearch.rankmap import ModelRecord, RankMap, WidthsRecord
from ranksearch.scoring import as_deployed, reproducible, score
from ranksearch.surgery import count_macs, count_params

RUNS = {1: 300, 64: 40}
"""Images at a time to runs that are timed."""


def stored(form: str, bits: int, folder: Path) -> tuple[Evaluator, float, Path]:
    """What evaluates, the simulated accuracy on the report images, and the compressed weights with their map inside."""
    ours = evaluator(form, bits, folder)
    bench, space = ours.bench, ours.bench.space
    picked = {name: c for name, c in bench.table.picked(dearest(bench.table)).items() if not c.dense}
    model, shape, widths = ours.build(picked).model, bench.data.input_shape, space.quantise
    assert widths is not None
    with as_deployed(model, widths, bench.data):
        simulated = score(model, bench.data.report, bench.data, batch_images=128, device=ours.device)
    rank_map = RankMap(
        model=ModelRecord(name=space.model.name, options=space.model.options, input_shape=shape),
        layers=layers_of(picked, bench.table.convs, space.stabilise),
        macs=count_macs(model, shape),
        params=count_params(model),
        dense_macs=bench.table.dense_macs,
        dense_params=bench.table.dense_params,
        widths=WidthsRecord(**widths.model_dump(exclude={"weight_bits"})),
        provenance={"seed": space.seed, "data": space.data.model_dump(mode="json"), "batch_images": 128},
    )
    file = folder / f"{form}-{bits}.safetensors"
    save_compressed(model.state_dict(), rank_map, file)
    return ours, simulated.accuracy, file


def session(file: Path, optimised: Path | None = None) -> Any:
    """ONNX Runtime with one thread."""
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def accuracy(file: Path, ours: Evaluator) -> float:
    """Of a file in ONNX Runtime, on the report images."""
    runs, report, right = session(file), ours.bench.data.report, 0
    for start in range(0, len(report), 128):
        images = to_input(report.images[start : start + 128], ours.bench.data).contiguous().numpy()
        outputs = runs.run(None, {"images": images})[0]
        right += int((outputs.argmax(1) == report.labels[start : start + 128]).sum())
    return right / len(report)


def fastest(files: list[Path], shape: tuple[int, ...], images: int, runs: int) -> list[float]:
    """Milliseconds of a run of each file on so many images at a time."""
    feed = {"images": torch.randn(images, *shape, generator=torch.Generator().manual_seed(0)).numpy()}
    running = [session(file) for file in files]
    best = [float("inf")] * len(files)
    for _ in range(runs):
        for i, one in enumerate(running):
            started = time.thread_time()
            one.run(None, feed)
            best[i] = min(best[i], 1e3 * (time.thread_time() - started))
    return best


def in_int8(file: Path, folder: Path) -> str:
    """Convolutions and products that run in int8, of all, in what ONNX Runtime makes of the file."""
    session(file, folder / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]
    whole = sum(kind in ("QLinearConv", "QGemm") for kind in kinds)
    return f"{whole} of {whole + sum(kind in ('Conv', 'FusedConv', 'Gemm', 'MatMul') for kind in kinds)}"


def row(form: str, bits: int, folder: Path) -> None:
    """Print one network's accuracies, sizes and latencies."""
    ours, simulated, file = stored(form, bits, folder)
    files = [folder / "int8.onnx", folder / "float32.onnx"]
    found = deploy(file, files[0], to="onnx-int8", storage=folder)
    deploy(file, files[1], to="onnx", storage=folder, images="noise")  # what it computes is scored below
    scores = " | ".join(f"{100 * value:.2f}" for value in (simulated, *(accuracy(path, ours) for path in files)))
    agreement = 100 * found.agreement.top1_agreement
    sizes = " | ".join(f"{path.stat().st_size / 1e3:.0f}" for path in files)
    times = " | ".join(
        f"{ms:.2f}" for size in RUNS.items() for ms in fastest(files, ours.bench.data.input_shape, *size)
    )
    run = in_int8(files[0], folder)
    print(f"| {form} | {bits} | {scores} | {agreement:.2f} | {run} | {sizes} | {times} |", flush=True)


def main() -> None:
    """Build, write, score and print."""
    print("# Whole numbers in ONNX Runtime\n")
    print("`python -m benchmarks.int8_export` says in its first lines what is compared. One seed.\n")
    head = ["format", "bits of weights", "simulated, %", "int8, %", "float32, %", "same class, %", "run in int8"]
    head += ["int8, kB", "float32, kB", *(f"{kind}, ms at {size}" for size in RUNS for kind in ("int8", "float32"))]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, reproducible(1):
        for form in FORMATS:
            for bits in (8, 4):
                row(form, bits, Path(folder))
    print(f"\nMachine: {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} (15 minutes); ", end="")
    print(", ".join(f"{name} {value}" for name, value in versions().items()), end="")
    print(f", onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
