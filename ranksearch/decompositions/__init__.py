"""The formats a layer may take, one file a family.

To add a format, write a class with ``name``, ``nested``, ``max_rank``, ``stages``, ``prepare``, ``error`` and
``factors`` (see :class:`~ranksearch.decompositions.format.Format`; ``tucker2.py`` is the shortest example, ``cp.py``
is one that is fitted) and put an instance in ``FORMATS``. Its MACs, modules, bounds, groups, biases, caching, refitting
and rank-map entries follow from these. Then add its name to the table of ``tests/cases.py``, which runs the whole
conformance suite on it.
"""

from __future__ import annotations

from ranksearch.decompositions.cp import Cp
from ranksearch.decompositions.format import (
    Format,
    Kind,
    OwnGauge,
    Prepared,
    Ranks,
    Statistics,
    chain,
    check_ranks,
    compressed_stages,
    error,
    kernels,
    max_rank,
    prepare,
    regauged,
    stages,
)
from ranksearch.decompositions.grid import rank_grid
from ranksearch.decompositions.measures import Report, report, sensitivity
from ranksearch.decompositions.svd import ChannelSvd, SpatialSvd, Svd
from ranksearch.decompositions.tensor_chain import TensorChain
from ranksearch.decompositions.tensor_train import TensorTrain
from ranksearch.decompositions.tkd_cp import TkdCp
from ranksearch.decompositions.tucker2 import Tucker2

_SLICED: tuple[Format, ...] = (Tucker2(), Svd(), SpatialSvd(), ChannelSvd())
_FITTED: tuple[Format, ...] = (
    Cp("cp", apart=False),
    Cp("cp4", apart=True),
    TkdCp(),
    TensorChain(),
    TensorTrain(),
)
FORMATS: dict[str, Format] = {form.name: form for form in (*_SLICED, *_FITTED)}

__all__ = [
    "FORMATS",
    "Format",
    "Kind",
    "OwnGauge",
    "Prepared",
    "Ranks",
    "Report",
    "Statistics",
    "chain",
    "check_ranks",
    "compressed_stages",
    "error",
    "kernels",
    "max_rank",
    "prepare",
    "rank_grid",
    "regauged",
    "report",
    "sensitivity",
    "stages",
]
