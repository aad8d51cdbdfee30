"""``auto`` beside the other strategies on networks that it was not made on; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.unseen --storage folder``, the folder
of data as ``search_spaces/resnet20-cifar10.yaml`` describes it. What the storage has is not trained or searched again.

Three small networks are trained on the 25,000 training images, for eight epochs: plain convolutions without batch norms
or skips; inverted residuals, whose work is in 1x1 convolutions; dense blocks, whose outputs are concatenated. All are
searched in the same formats with the defaults of a space, nothing set for the network; factors are activation-aware,
all of them refitted, nothing is trained. Allocators get a rank map within each target, searches 20 trials; samplers
begin cold. Accuracies are those of the 2,500 report images, of what the search images choose. Minutes are those of the
trials; the prices that a row needs come to them.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch import parse_space
from ranksearch.comparison import Comparison, compare
from ranksearch.preparation import versions
from ranksearch.trial import NORMAL

TARGETS = (0.7, 0.5, 0.35, 0.25)
EPOCHS, BATCH_IMAGES = 8, 128
TRIALS = 20
ALLOCATORS = (
    "uniform",
    "energy",
    "water-filling",
    "evbmf",
    "alds",
    "lc@weight",
    "eps@drop",
    "greedy@loss",
    "knapsack@divergence",
    "knapsack@predicted",
)
SEARCHES = ("auto", "auto@second-order", "optuna", "optuna:tpe")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain() -> nn.Module:
    """Eight convolutions, the first 5x5, without batch norms or skips."""
    widths, layers, inputs = (24, 24, 48, 48, 48, 96, 96, 96), list[nn.Module](), 3
    for number, width in enumerate(widths):
        kernel = 5 if number == 0 else 3
        conv = nn.Conv2d(inputs, width, kernel, padding=kernel // 2)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.ReLU(inplace=True), *([nn.MaxPool2d(2)] if number in (1, 4) else [])]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class _Inverted(nn.Module):
    """Widen, depthwise, narrow; with a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same at the stride."""
        found: Tensor = self.body(x)
        return x + found if self.skip else found


def inverted() -> nn.Module:
    """Inverted residuals in three stages."""
    blocks, inputs = list[nn.Module](), 16
    for outputs, stride in ((16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)):
        blocks.append(_Inverted(inputs, outputs, stride))
        inputs = outputs
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)]
    head = [nn.Conv2d(inputs, 192, 1, bias=False), nn.BatchNorm2d(192), nn.ReLU6(inplace=True)]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))


class _Dense(nn.Module):
    """One layer of a dense block: what it finds is put beside what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C + growth, H, W)``."""
        return torch.cat([x, self.body(x)], 1)


def dense() -> nn.Module:
    """Three dense blocks of four layers, narrowed and pooled between them."""
    growth, inputs = 16, 32
    layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, 2, 1, bias=False)]
    for block in range(3):
        for _ in range(4):
            layers.append(_Dense(inputs, growth))
            inputs += growth
        if block < 2:
            narrow = inputs // 2
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, narrow, 1, bias=False), nn.AvgPool2d(2)]
            inputs = narrow
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers)


NETWORKS = {"plain": plain, "inverted": inverted, "dense": dense}


def space_of(network: str, weights: Path) -> dict[str, Any]:
    """The space of a network."""
    return {
        "model": {"name": f"benchmarks.unseen:{network}", "weights": str(weights)},
        "data": {
            "source": "npz",
            "root": "${RANKSEARCH_DATA}",
            "train": ["cifar10-train-0.npz", "cifar10-train-1.npz"],
            "validation": ["cifar10-val.npz"],
            "search_images": 2500,
            "report_images": 2500,
            "mean": list(MEAN),
            "std": list(STD),
        },
        "formats": ["tucker2", "spatial-svd", "channel-svd", "svd"],
        "strategy": {"seeds": []},
        "evaluation": {"factors": "activation-aware"},
        "resources": {"engine": "local"},
        "tracking": {"enabled": False},
    }


def batch(images: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Normalised, mirrored and cropped at random."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    found = np.empty_like(images)
    for i, (top, left, mirrored) in enumerate(generator.integers(0, (9, 9, 2), (len(images), 3))):
        cut = padded[i, top : top + 32, left : left + 32]
        found[i] = cut[:, ::-1] if mirrored else cut
    scaled = (torch.from_numpy(found).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2)


def train(network: str, path: Path) -> None:
    """Train a network and keep its weights."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    files = [np.load(Path(os.environ["RANKSEARCH_DATA"]) / f"cifar10-train-{i}.npz") for i in (0, 1)]
    images, labels = (np.concatenate([file[key] for file in files]) for key in ("images", "labels"))
    model = NETWORKS[network]().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = len(images) // BATCH_IMAGES
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.004, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for rows in generator.permutation(len(images))[: steps * BATCH_IMAGES].reshape(steps, -1):
            optimiser.zero_grad()
            outputs = model(batch(images[rows], generator))
            F.cross_entropy(outputs, torch.from_numpy(labels[rows]).long()).backward()
            optimiser.step()
            schedule.step()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def compared(network: str, strategies: tuple[str, ...], trials: int, seeds: int, storage: Path) -> Comparison:
    """The rows of these strategies."""
    space = space_of(network, storage / f"{network}.safetensors") | {"budget": {"trials": trials}}
    name = f"{network}-{trials}"
    return compare(parse_space(space), strategies, seeds=seeds, targets=TARGETS, storage=storage, name=name)


def joined(a: Comparison, b: Comparison) -> Comparison:
    """The rows of both as one comparison."""
    return replace(
        a, strategies=a.strategies + b.strategies, runs=a.runs + b.runs, failures={**a.failures, **b.failures}
    )


def main() -> None:
    """Train and search what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="where weights and studies are kept")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.storage.mkdir(parents=True, exist_ok=True)
    print("# auto on networks that it was not made on\n")
    print("`python -m benchmarks.unseen` says in its first lines what is done. In bold: no worse than the best of its")
    print("column beyond chance in the report images (95 %).")
    for network in arguments.networks:
        weights = arguments.storage / f"{network}.safetensors"
        if not weights.exists():
            train(network, weights)
        searches = compared(network, SEARCHES, TRIALS, arguments.seeds, arguments.storage)
        found = joined(searches, compared(network, ALLOCATORS, len(TARGETS), arguments.seeds, arguments.storage))
        print(f"\n## {network}: dense {100 * found.runs[0].dense_accuracy:.2f} %\n")
        print(f"| strategy | {' | '.join(f'{target:.2f}' for target in TARGETS)} | minutes |")
        print(f"|---|{'---:|' * (len(TARGETS) + 1)}")
        for row in found.summary().to_dict("records"):
            cells = []
            for target in TARGETS:
                count, mean = row[f"found_{target:g}"], 100 * row[f"before_{target:g}"]
                half = 100 * row[f"before_half_range_{target:g}"]
                missing = "" if count == arguments.seeds else f"({count}) "
                least = row[f"before_behind_{target:g}"] <= NORMAL * row[f"before_behind_error_{target:g}"]
                mark = "**" if least else ""
                cells.append(f"{mark}{missing}{mean:.2f} ± {half:.2f}{mark}" if count else "none")
            print(f"| {row['strategy']} | {' | '.join(cells)} | {row['minutes']:.1f} |", flush=True)
        for label, reason in found.failures.items():
            print(f"\n`{label}` could not search: {reason}")
    print(f"\n{time.strftime('%Y')}; {os.cpu_count()} cores; ", end="")
    print(", ".join(f"{name} {value}" for name, value in versions().items()) + ".")


if __name__ == "__main__":
    main()
