"""Funnel regularisation beside L1 and L2 on the same gates: ResNet-20 on CIFAR-10 at equal schedules; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.funnel_resnet20 results.jsonl``, the
folder as ``search_spaces/resnet20-cifar10.yaml`` describes it. Every run gates all inner 3x3 convolutions (Tucker-2,
activation-aware), is steered to a MAC target, and is scored on the 2,500 report images when the gates are folded,
with batch norm recalibrated, and when the folded network is fine-tuned. Runs whose line is in ``results.jsonl``
already are not made again. One thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ranksearch.calibration import collect
from ranksearch.config import load_space
from ranksearch.data import Data, load_data, to_input
from ranksearch.decompositions import FORMATS, Prepared, prepare
from ranksearch.funnel import Funnel, FunnelSpec
from ranksearch.funnel.penalty import Penalty
from ranksearch.models import build_model
from ranksearch.refit import recalibrate
from ranksearch.scoring import score
from ranksearch.space import FineTuneSpec
from ranksearch.surgery import channels_last, find_layers, kernel_of, replaced
from ranksearch.training import computes_bfloat16

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
PENALTIES: tuple[Penalty, ...] = ("funnel", "l1", "l2")
TARGETS = (0.5, 0.35, 0.7)
BATCH_IMAGES = 32
SETTLE_STEPS, PENALTY_STEPS = 10, 200
TUNE_STEPS = 150
CPU = torch.device("cpu")


def spec_of(penalty: Penalty, target: float) -> FunnelSpec:
    """The schedule, the same for all but the penalty and the target."""
    # Few and small batches: a gentle fine-tuning, and a strength to start at that is ten times the published.
    tune = FineTuneSpec(
        steps=TUNE_STEPS,
        batch_images=BATCH_IMAGES,
        weight_decay=0.0,
        optimiser="sgd",
        batch_norm="batch",
        learning_rate=0.003,
    )
    return FunnelSpec(
        penalty=penalty,
        target=target,
        strength=0.05,
        fine_tune=tune,
        settle_steps=SETTLE_STEPS,
        penalty_steps=PENALTY_STEPS,
    )


def one_run(
    dense: nn.Module, formats: dict[str, str], prepared: dict[str, Prepared], data: Data, spec: FunnelSpec
) -> dict[str, Any]:
    """The line of one run: accuracies when folded and when fine-tuned."""
    started = time.process_time()
    dtype = torch.bfloat16 if computes_bfloat16(CPU) else torch.float32
    run = Funnel(dense, formats, prepared, data, spec, seed=0, dtype=dtype)
    while run.steps < run.gated_steps:
        run.step()
    folded = replaced(run.training.model, {})
    recalibrate(folded, to_input(data.calibration[:512], data).split(128))
    result = run.run()
    return {
        "penalty": spec.penalty,
        "target": spec.target,
        "macs_ratio": result.macs_ratio,
        "threshold": result.threshold,
        "folded": score(folded, data.report, data, batch_images=128, device=CPU).accuracy,
        "tuned": score(result.model, data.report, data, batch_images=128, device=CPU).accuracy,
        "compressed_layers": len(result.layers),
        "minutes": (time.process_time() - started) / 60,
        "ranks": {name: layer.ranks for name, layer in result.layers.items()},
        "history": result.history,
    }


def show(lines: list[dict[str, Any]], dense: float) -> None:
    """Print the table."""
    print(
        f"{SETTLE_STEPS} steps at full rank, {PENALTY_STEPS} under the penalty, {TUNE_STEPS} of "
        f"fine-tuning, of {BATCH_IMAGES} images each. Dense: {100 * dense:.2f} % on the report images.\n"
    )
    print("| MAC target | penalty | MACs | threshold | layers compressed | folded | fine-tuned | CPU minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for target in TARGETS:
        for line in (x for x in lines if x["target"] == target):
            print(
                f"| {target} | {line['penalty']} | {line['macs_ratio']:.3f} | {line['threshold']:.3g} "
                f"| {line['compressed_layers']} | {100 * line['folded']:.2f} % | {100 * line['tuned']:.2f} % "
                f"| {line['minutes']:.1f} |"
            )
    print(f"\nMachine: {os.cpu_count()} cores, one used; torch {torch.__version__}.", flush=True)


def main() -> None:
    """Make the runs that are missing, and print the table of all."""
    torch.set_num_threads(1)
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "funnel_resnet20.jsonl")
    space = load_space(SPACE)
    data = load_data(space.data, cache=results.parent, seed=0)
    weights = Path(space.data.root or "", space.model.weights or "")
    dense = channels_last(build_model(space.model, weights=weights))
    convs = {layer.name: layer.conv for layer in find_layers(dense, data.input_shape)[1:-1]}
    known = collect(dense, convs, to_input(data.calibration[:1024], data).split(128))
    formats = dict.fromkeys(convs, "tucker2")
    prepared: dict[str, Prepared] = {
        name: prepare(FORMATS["tucker2"], conv, kernel_of(dense.get_submodule(name))[0], known[name])
        for name, conv in convs.items()
    }
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for target in TARGETS:
        for penalty in PENALTIES:
            if not any((line["penalty"], line["target"]) == (penalty, target) for line in lines):
                lines.append(one_run(dense, formats, prepared, data, spec_of(penalty, target)))
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    show(lines, score(dense, data.report, data, batch_images=128, device=CPU).accuracy)


if __name__ == "__main__":
    main()
