"""ResNet-20 on CIFAR-10 in int8: rank maps with widths as files of whole numbers, in two runtimes; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.int8_export``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. The networks are those of ``benchmarks/few_bits.py``: the
knapsack's rank maps at half of the MACs, weights of 8 and 4 bits, activations of 8, nothing trained. Each is written as
``ranksearch apply --to`` does, in int8 (``onnx-int8``, ``pt2-int8``) and in float32 (``onnx``, ``pt2``: the same
rounded weights, activations as they are), and scored on the report images; what the search scores is the simulation.
Files of torch run compiled, with freezing. Latencies are the time that the one thread has the processor, which other
work beside it lengthens little; files run in turn, the fastest counts.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import torch.ao.quantization.fx._decomposed  # names the operators of whole numbers
from torch import Tensor
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import machine
from benchmarks.few_bits import FORMATS, evaluator, halved
from ranksearch.data import to_input
from ranksearch.deployment import TARGETS, deploy
from ranksearch.deployment.target import Runner
from ranksearch.evaluation import Evaluator, layers_of
from ranksearch.export import save_compressed
from ranksearch.rankmap import ModelRecord, RankMap, WidthsRecord
from ranksearch.scoring import as_deployed, reproducible, score
from ranksearch.surgery import count_macs, count_params

RUNS = {1: 300, 64: 40}
"""Images at a time to runs that are timed."""
WRITTEN = {
    "onnx": "ONNX Runtime, float32",
    "onnx-int8": "ONNX Runtime, int8",
    "pt2": "inductor, float32",
    "pt2-int8": "inductor, int8",
}
"""Format of files to what it is called in the table."""


def stored(form: str, bits: int, folder: Path) -> tuple[Evaluator, float, Path]:
    """What evaluates, the simulated accuracy on the report images, and the compressed weights with their map inside."""
    ours = evaluator(form, bits, folder)
    bench, space = ours.bench, ours.bench.space
    picked = {name: c for name, c in bench.table.picked(halved(bench.table)).items() if not c.dense}
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
    # On x86 without VNNI, sums of products of int8 would overflow their 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def runner(file: Path) -> Runner:
    """A file in its runtime, on one thread."""
    if file.suffix == ".onnx":
        runs = session(file)
        return lambda images: torch.from_numpy(runs.run(None, {"images": images.contiguous().numpy()})[0])
    compiled = torch.compile(torch.export.load(file).module())

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        with inductor.patch(freezing=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Tensor = compiled(images)
        return found

    return run


def accuracy(run: Runner, ours: Evaluator) -> float:
    """Of a file, on the report images."""
    report, right = ours.bench.data.report, 0
    for start in range(0, len(report), 128):
        outputs = run(to_input(report.images[start : start + 128], ours.bench.data))
        right += int((outputs.argmax(1).numpy() == report.labels[start : start + 128]).sum())
    return right / len(report)


def fastest(running: list[Runner], shape: tuple[int, ...], images: int, runs: int) -> list[float]:
    """Milliseconds of a run of each file on so many images at a time."""
    given = torch.randn(images, *shape, generator=torch.Generator().manual_seed(0))
    best = [float("inf")] * len(running)
    for i in range(runs + 1):
        for j, one in enumerate(running):
            started = time.thread_time()
            one(given)
            if i:  # the first may compile
                best[j] = min(best[j], 1e3 * (time.thread_time() - started))
    return best


def in_int8(file: Path, run: Runner, shape: tuple[int, ...], folder: Path) -> str:
    """Convolutions and products that run in int8, of all, in what the runtime makes of the file."""
    if file.suffix == ".onnx":
        session(file, folder / "optimised.onnx")
        kinds = [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]
        whole = {"QLinearConv", "QGemm"}
        other = {"Conv", "FusedConv", "Gemm", "MatMul"}
    else:
        images = torch.zeros(2, *shape)
        run(images)  # it may compile
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(images)
        kinds = [event.key for event in profiled.key_averages() for _ in range(event.count)]
        whole = {"onednn::qconv_pointwise", "onednn::qconv2d_pointwise", "onednn::qlinear_pointwise"}
        other = {"mkldnn::_convolution_pointwise", "aten::mkldnn_convolution", "aten::addmm", "aten::mm"}
    count = sum(kind in whole for kind in kinds)
    return f"{count} of {count + sum(kind in other for kind in kinds)}"


def rows(form: str, bits: int, folder: Path) -> None:
    """Print one network's accuracies, sizes and latencies."""
    ours, simulated, file = stored(form, bits, folder)
    shape = ours.bench.data.input_shape
    print(f"| {form} | {bits} | simulated | {100 * simulated:.2f} | | | | | |", flush=True)
    agreements, files = {}, {}
    for to in WRITTEN:
        files[to] = folder / f"{to}{TARGETS[to].suffix}"
        source = None if to.endswith("int8") else "noise"  # what the others compute is scored below
        agreements[to] = deploy(file, files[to], to=to, storage=folder, images=source).agreement
    running = {to: runner(path) for to, path in files.items()}
    scores = {to: accuracy(run, ours) for to, run in running.items()}
    times = {size: fastest(list(running.values()), shape, size, runs) for size, runs in RUNS.items()}
    for i, (to, words) in enumerate(WRITTEN.items()):
        whole = to.endswith("int8")
        same = f"{100 * agreements[to].top1_agreement:.2f}" if whole else ""
        run = in_int8(files[to], running[to], shape, folder) if whole else ""
        spent = " | ".join(f"{times[size][i]:.2f}" for size in RUNS)
        size = f"{files[to].stat().st_size / 1e3:.0f}"
        print(f"| {form} | {bits} | {words} | {100 * scores[to]:.2f} | {same} | {run} | {size} | {spent} |", flush=True)


def main() -> None:
    """Build, write, score and print."""
    print("# Whole numbers in ONNX Runtime and in inductor\n")
    print("`python -m benchmarks.int8_export` says in its first lines what is compared. One seed.\n")
    head = ["format", "bits of weights", "runs in", "report, %", "same class, %", "layers in int8", "kB"]
    head += [f"ms at {size}" for size in RUNS]
    print(f"| {' | '.join(head)} |\n|---|---:|---|{'---:|' * (len(head) - 3)}")
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, reproducible(1):
        for form in FORMATS:
            for bits in (8, 4):
                rows(form, bits, Path(folder))
    print(f"\n{machine(onnx=onnx.__version__, onnxruntime=onnxruntime.__version__)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
