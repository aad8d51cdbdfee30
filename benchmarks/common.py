"""What benchmarks share: a bench of no study, the dearest rank map within a target, the machine in words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ranksearch import load_space
from ranksearch.evaluation import Bench
from ranksearch.location import located
from ranksearch.preparation import Network, factorise, make_bench, read_network, settle, silent, versions
from ranksearch.space import Space
from ranksearch.table import PriceTable

SPACES = Path(__file__).parent.parent / "search_spaces"


def prepared(space: str, settings: Sequence[str], cache: Path, weights: Path) -> tuple[Network, Bench]:
    """The network of one of ``search_spaces`` and what evaluates its rank maps, prepared as a search prepares them.

    Args:
        space: the file's name.
        settings: changes as ``--set`` takes them.
        cache: folder of decompositions, prices and statistics.
        weights: folder of the evaluated networks' weights.
    """
    return benched(located(load_space(SPACES / space, settings), SPACES), cache, weights)


def benched(space: Space, cache: Path, weights: Path) -> tuple[Network, Bench]:
    """The same of any space whose paths are found from the working folder."""
    network = read_network(space, cache, silent)
    factors, failed = factorise(network, cache, silent)
    setting = settle(network, factors, failed, cache, silent)
    return network, make_bench(network, factors, setting, weights, cache, silent)


def dearest(table: PriceTable, maps: Iterable[Sequence[int]], target: float) -> tuple[int, ...]:
    """The rank map with the most MACs within a share of the dense network's.

    Raises:
        ValueError: none is within it.
    """
    within = [tuple(choices) for choices in maps if table.macs_ratio(choices) <= target]
    return max(within, key=lambda choices: table.macs(choices))


def machine(**more: str) -> str:
    """Cores, load and versions, and those of ``more`` packages, as the last line of a table of results."""
    found = ", ".join(f"{name} {version}" for name, version in {**versions(), **more}.items())
    return f"Machine: {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} (15 minutes); {found}."
