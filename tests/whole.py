"""Networks of few bits, and what exports of their whole numbers are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranksearch.deployment.target import Job
from ranksearch.handover import export_trial
from ranksearch.launch import search
from ranksearch.rankmap import RankMap, WidthsRecord
from ranksearch.rounding import ranges, rounding_activations, widths_of
from ranksearch.storage import Store
from ranksearch.surgery import apply_rank_map
from tests.integration.test_quantised_search import FEW
from tests.integration.test_search import QUICKSTART
from tests.maps import rank_map_for
from tests.networks import SharedNet, SmallNet, small_net

RANKS: dict[str, tuple[str, tuple[int, ...]]] = {
    "body.plain": ("tensor-chain", (2, 2, 2)),
    "body.strided": ("tucker2", (5, 6)),
    "body.grouped": ("spatial-svd", (3,)),
    "body.point": ("svd", (9,)),
    "tokens": ("svd", (3,)),
}
FOUR = ("body.strided", "tokens")
WIDTHS = WidthsRecord(other_bits=8, activation_bits=8, clip="mse")


def job_of(network: nn.Module, rank_map: RankMap, images: Tensor) -> Job:
    names = widths_of(network, {}, 8)
    clip = (rank_map.widths or WIDTHS).clip
    known = ranges(network, names, images, clip) if (rank_map.widths or WIDTHS).activation_bits == 8 else {}
    return Job(rank_map=rank_map, network=network, structure=network, calibration=(images,), ranges=known)


def few(name: str, dense: nn.Module, shape: tuple[int, int, int], ranks: Any, widths: WidthsRecord = WIDTHS) -> RankMap:
    """A map of eight bits, some layers of four."""
    made = rank_map_for(name, dense, shape, ranks)
    layers = {n: layer.model_copy(update={"bits": 4 if n in FOUR else 8}) for n, layer in made.layers.items()}
    return made.model_copy(update={"layers": layers, "widths": widths})


def small(widths: WidthsRecord = WIDTHS) -> tuple[nn.Module, RankMap]:
    dense = small_net()
    rank_map = few("tests.networks:SmallNet", dense, SmallNet.shape, RANKS, widths)
    return apply_rank_map(rank_map, dense).eval(), rank_map


@torch.no_grad()
def simulated(network: nn.Module, job: Job, images: Tensor) -> Tensor:
    with rounding_activations(network, job.ranges or {}):
        return network(images)  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Tensor, plain: Tensor) -> bool:
    """Whether ``found`` is nearer to the simulation than the network that rounds no activations is; none by chance."""
    return float((found - wanted).square().mean()) < float((plain - wanted).square().mean())


def calibrated(
    name: str, dense: nn.Module, shape: tuple[int, int, int], ranks: dict[str, tuple[str, tuple[int, ...]]]
) -> tuple[Job, Tensor]:
    """A network of few bits to be written, and the images that its ranges are of."""
    rank_map = few(name, dense.eval(), shape, ranks)
    images = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    return job_of(apply_rank_map(rank_map, dense).eval(), rank_map, images), images


def running_twice() -> tuple[Job, Tensor]:
    """One with a layer that runs more than once."""
    torch.manual_seed(0)
    return calibrated("shared", nn.Sequential(SharedNet()), SharedNet.shape, {"0.first": ("tucker2", (3, 3))})


def turned(groups: int) -> tuple[Job, Tensor]:
    """One with a transposed convolution of so many groups."""
    torch.manual_seed(0)
    return calibrated("turned", Turned(groups), (4, 6, 6), {"first": ("tucker2", (3, 3))})


PARTLY = pytest.mark.parametrize(
    "widths",
    [
        WidthsRecord(other_bits=8, activation_bits=32, clip="mse"),
        WidthsRecord(other_bits=32, activation_bits=8, clip="percentile"),
    ],
    ids=["activations in float32", "other weights in float32"],
)
"""Widths of networks of which a part stays as it is."""


def searched(folder: Path) -> tuple[Path, RankMap]:
    """The rank map of a search, with its weights beside it, that has layers of four bits."""
    settings = [*(one for one in FEW if not one.startswith("budget.trials")), "budget.trials=2"]
    study = search(QUICKSTART, settings=settings, storage=folder, name="few")
    trial = study.front_trials()[0]
    made = export_trial(study, trial, Store(folder), folder / "m.json", weights=folder / "w.safetensors")
    return folder / "m.json", made


class Turned(nn.Module):
    """A transposed convolution."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(torch.relu(self.first(x))).mean((2, 3))
        return found


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))
        return found
