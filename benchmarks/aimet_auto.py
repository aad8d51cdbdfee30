"""AIMET's automatic rank selection for spatial SVD on CIFAR-10, by default of ResNet-20; prints Markdown, writes maps.

Run from the root of the repository, in an environment of its own, with ``aimet-torch`` 2.42 and what ranksearch imports
while it prepares a search: ``RANKSEARCH_DATA=folder python -m benchmarks.aimet_auto --maps-to folder``, the data as
``search_spaces/resnet20-cifar10.yaml`` describes them. How that environment is made stands in
``benchmarks/results/aimet_auto.md``; the maps are for a comparison in the environment of ranksearch.

``ModelCompressor.compress_model`` is run in its auto mode, cost in MACs, with its defaults: for every layer alone ten
candidate ratios less the last, each scored by the accuracy on calibration images, then one score for all layers, found
by bisection so that the network meets the target. The layers are those that the space searches: all other convolutions
are ignored, and linear layers always are. The scores depend on no target, so they are measured once and handed on as
``saved_eval_scores_dict``, as AIMET offers. It does not restore batch norms, and nothing is fine-tuned. Accuracies are
those of the 2,500 report images: of AIMET's network, and of one with the same ranks and our factors, activation-aware
from the space's calibration images. AIMET's count of MACs assumes a first stage of a column (height x 1) with the
vertical stride, as our ``spatial-svd`` has it; the MACs shown are PyTorch's, counted on AIMET's network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
from aimet_torch.common.utils import AimetLogger
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import SpatialSvdParameters
from torch import nn

from ranksearch.config import load_space
from ranksearch.data import to_input
from ranksearch.decompositions import FORMATS, compressed_stages
from ranksearch.location import located
from ranksearch.preparation import Network, read_network, silent, statistics_of, versions
from ranksearch.rankmap import LayerRanks, RankMap
from ranksearch.scoring import score
from ranksearch.surgery import apply_rank_map, count_macs, skeleton

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
TARGETS = (0.70, 0.50, 0.35)
"""Shares of the MACs of the whole network."""
CANDIDATES = 10
"""AIMET's default: ratios 0.1, 0.2, ... 0.9 of a layer's MACs."""
FORM = "spatial-svd"


class Accuracy:
    """Top-1 accuracy on calibration images, as AIMET asks for it; counts how often it is asked."""

    def __init__(self, network: Network, images: int) -> None:
        self.calls = 0
        data = network.data
        self.images = to_input(data.calibration[:images], data).split(network.space.evaluation.batch_images)
        labels = torch.as_tensor(data.train.labels[: len(data.calibration[:images])])
        self.labels = labels.split(network.space.evaluation.batch_images)

    @torch.no_grad()
    def __call__(self, model: nn.Module, iterations: Any = None, use_cuda: bool = False) -> float:
        """From 0 to 1; always on all the images."""
        self.calls += 1
        batches = zip(self.images, self.labels, strict=True)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
        return right / sum(map(len, self.labels))


def compress(network: Network, accuracy: Accuracy, target: float, scores: Path) -> nn.Module:
    """AIMET's network for one target; the scores of all candidates are read, or measured and left in the folder."""
    model, selection = network.model, network.selection
    ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in selection.searched]
    greedy = GreedySelectionParameters(
        target_comp_ratio=target,
        num_comp_ratio_candidates=CANDIDATES,
        saved_eval_scores_dict=str(scores) if scores.exists() else None,
    )
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=ignored)
    compressed: nn.Module
    compressed, _ = ModelCompressor.compress_model(
        model,
        eval_callback=accuracy,
        eval_iterations=None,
        input_shape=(1, *network.data.input_shape),
        compress_scheme=CompressionScheme.spatial_svd,
        cost_metric=CostMetric.mac,
        parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, auto),
    )
    return compressed


def rank_map_of(network: Network, compressed: nn.Module, provenance: dict[str, Any], accuracy: float) -> RankMap:
    """The ranks of AIMET's network: it puts a pair of convolutions in the place of a layer."""
    selection, layers = network.selection, {}
    for name in selection.searched:
        found = compressed.get_submodule(name)
        if isinstance(found, nn.Sequential):
            first = found[0]
            assert isinstance(first, nn.Conv2d)
            conv, ranks = selection.layers[name].conv, (first.out_channels,)
            stages = compressed_stages(FORMATS[FORM], conv, ranks)
            macs, params = sum(stage.macs for stage in stages), sum(stage.params for stage in stages)
            layers[name] = LayerRanks(format=FORM, ranks=ranks, conv=conv.to_json(), macs=macs, params=params)
    convs = {name: selection.layers[name].conv for name in layers}
    return RankMap(
        model=network.record,
        layers=layers,
        macs=selection.macs + sum(layer.macs - convs[name].macs for name, layer in layers.items()),
        params=selection.params + sum(layer.params - convs[name].params for name, layer in layers.items()),
        dense_macs=selection.macs,
        dense_params=selection.params,
        metrics={"accuracy": accuracy, "report_images": len(network.data.report)},
        provenance=provenance,
    )


def check_structure(network: Network, rank_map: RankMap, compressed: nn.Module) -> None:
    """Whether our network of these ranks has the very stages of AIMET's, by shapes, strides and counted MACs."""

    def geometry(model: nn.Module) -> list[Any]:
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        return [(m.weight.shape, m.stride, m.padding) for m in convs]

    ours, shape = skeleton(rank_map, network.model), network.data.input_shape
    if geometry(ours) != geometry(compressed) or count_macs(compressed, shape) != rank_map.macs:
        raise SystemExit("AIMET's network is not built as our spatial-svd of the same ranks: the map would not be its.")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """AIMET leaves its scores in the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    """Select ranks for all targets, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps-to", type=Path, help="folder for the rank maps, aimet-0.70.json and so on")
    parser.add_argument("--images", type=int, default=1024, help="calibration images that score a candidate")
    parser.add_argument("--space", type=Path, default=SPACE, help="search space: the network and its layers")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the MACs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    AimetLogger.set_level_for_all_areas(logging.WARNING)
    maps_to = chosen.maps_to.resolve() if chosen.maps_to else None
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as name:
        folder = Path(name)
        network = read_network(located(load_space(chosen.space, [f"formats=[{FORM}]"]), chosen.space.parent), folder)
        print(f"{len(network.selection.searched)} layers, {chosen.images} calibration images.\n", flush=True)
        print("| target | MACs | layers compressed | evaluations | wall, s | processor, s | AIMET | our factors |")
        print("|---|---|---|---|---|---|---|---|")
        statistics = statistics_of(network, network.selection.convs(), folder, silent)
        accuracy = Accuracy(network, chosen.images)
        for target in chosen.targets:
            calls, wall, processor = accuracy.calls, time.perf_counter(), time.process_time()
            with working_in(folder):
                compressed = compress(network, accuracy, target, folder / "data/greedy_selection_eval_scores_dict.pkl")
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            calls = accuracy.calls - calls
            theirs = accuracy_of(network, compressed)
            provenance = {
                "origin": f"aimet-torch {importlib.metadata.version('aimet-torch')}, spatial SVD, auto mode",
                "target": target,
                "images": chosen.images,
                "num_comp_ratio_candidates": CANDIDATES,
                "evaluations": calls,
                "seconds": wall,
                "versions": versions(),
            }
            rank_map = rank_map_of(network, compressed, provenance, theirs)
            check_structure(network, rank_map, compressed)
            if maps_to:
                maps_to.mkdir(parents=True, exist_ok=True)
                rank_map.save(maps_to / f"aimet-{target:.2f}.json")
            ours = accuracy_of(network, apply_rank_map(rank_map, network.model, statistics))
            print(
                f"| {target:.2f} | {rank_map.macs_ratio:.4f} | {len(rank_map.layers)} | {calls} | {wall:.1f} "
                f"| {processor:.1f} | {100 * theirs:.2f} % | {100 * ours:.2f} % |",
                flush=True,
            )
        print(f"\nDense: {100 * accuracy_of(network, network.model):.2f} % on the report images.\n")
    found = versions() | {"aimet-torch": importlib.metadata.version("aimet-torch")}
    print(f"Machine: {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} (15 minutes); ", end="")
    print(", ".join(f"{key} {value}" for key, value in found.items()) + ".")


def accuracy_of(network: Network, model: nn.Module) -> float:
    """Top-1 on the report images, from 0 to 1."""
    batch, data = network.space.evaluation.batch_images, network.data
    return score(model, data.report, data, batch_images=batch, device=torch.device("cpu")).accuracy


if __name__ == "__main__":
    main()
