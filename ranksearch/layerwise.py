"""One layer of a network in every format: how the error falls with the MACs, and how stable the factors are.

Nothing is searched or trained. All formats are measured in one metric: the relative squared error of the kernel, or
with calibration images that of the kernel weighted by the second moment of its inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.config import load_space
from ranksearch.conv import Conv
from ranksearch.decompositions import (
    FORMATS,
    Kind,
    Prepared,
    Ranks,
    Report,
    Statistics,
    check_ranks,
    compressed_stages,
    error,
    kernels,
    max_rank,
    prepare,
    rank_grid,
    report,
)
from ranksearch.decompositions.format import square_roots
from ranksearch.errors import ModelError, RankError, SpaceError, UnsupportedLayer
from ranksearch.location import located
from ranksearch.models import build_model, find_weights, input_shape_of
from ranksearch.preparation import Notify, read_network, silent, statistics_of
from ranksearch.pricing import unknown_formats
from ranksearch.space import ModelSpec, RanksSpec, Space, StabiliseSpec
from ranksearch.storage import Store
from ranksearch.surgery import Shape, find_layers, kernel_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format at some ranks."""

    format: str
    ranks: Ranks
    macs: int
    """Multiply-accumulates per image of the layer."""
    macs_ratio: float
    """Of the dense layer's."""
    params: int
    relative_error: float
    """Squared norm of the difference over that of the kernel, in the metric of the decomposition."""
    sensitivity: float
    """Expected squared error of the kernel per unit variance of noise on every entry of the factors."""
    degeneracy: float | None
    """Norm of the largest term over the norm of the kernel, where the format is a sum of terms that can cancel."""
    seconds: float
    """Of the factors at these ranks, after what is done once a layer."""


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A layer in several formats."""

    layer: str
    conv: Conv
    kind: Kind
    """``activation-aware`` where calibration images were given."""
    stabilise: StabiliseSpec
    chosen: Row | None
    """The format and ranks asked for, if any."""
    rows: tuple[Row, ...]
    """Of every format some ranks, by rising MACs."""
    prepare_seconds: Mapping[str, float]
    """By format: of what is done once a layer."""
    refused: Mapping[str, str]
    """Formats that are not for this layer, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return {
            "layer": self.layer,
            "conv": self.conv.to_json(),
            "macs": self.conv.macs,
            "params": self.conv.params,
            "kind": self.kind,
            "stabilise": self.stabilise.model_dump(),
            "chosen": asdict(self.chosen) if self.chosen else None,
            "rows": [asdict(row) for row in self.rows],
            "prepare_seconds": dict(self.prepare_seconds),
            "refused": dict(self.refused),
        }


def decompose_layer(
    model: str | Path,
    layer: str,
    *,
    weights: str | Path | None = None,
    form: str | None = None,
    ranks: Ranks | None = None,
    formats: Sequence[str] | None = None,
    stabilise: StabiliseSpec | None = None,
    input_shape: Shape | None = None,
    points: int = 8,
    storage: str | Path | None = None,
    notify: Notify = silent,
) -> Decomposition:
    """Decompose one layer.

    Args:
        model: an architecture, or a space file (``.yaml``), whose calibration images make the factors activation-aware.
        layer: the module's name.
        weights: of an architecture: safetensors, or a state dict.
        form: a format to look at closely, at ``ranks``.
        ranks: of ``form``.
        formats: whose curves are drawn; all by default, none for an empty sequence.
        stabilise: what is done to fits; the space's, or the default.
        input_shape: channels and size of one image; known for the built-in architectures.
        points: rank tuples a format at most.
        storage: where the cache is.
        notify: told what is being done.

    Raises:
        SpaceError: an unknown format.
        ModelError: no such layer, or the network cannot be read.
        UnsupportedLayer: ``form`` is not for this layer, or no format is.
        RankError: ``ranks`` out of bounds.
        DecompositionError: the kernel cannot be decomposed.
    """
    wanted = [*(FORMATS if formats is None else formats)]
    _refuse_unknown([*wanted, *([form] if form else [])])
    subject = _read(model, layer, weights, input_shape, storage, notify)
    stabilise = stabilise or subject.stabilise
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    chosen = None
    names = list(dict.fromkeys([*([form] if form else []), *wanted]))
    for i, name in enumerate(names):
        notify(f"decomposing {layer}", i, len(names))
        try:
            _check(subject, layer, name, asked=name == form, ranks=ranks)
        except UnsupportedLayer as reason:
            if name == form:
                raise
            refused[name] = str(reason)
            continue
        started = time.perf_counter()
        prepared = prepare(FORMATS[name], subject.conv, subject.weight, subject.statistics)
        seconds[name] = time.perf_counter() - started
        if name == form and ranks is not None:
            chosen = _row(subject, name, prepared, ranks, stabilise)
        if name in wanted:
            rows += [_row(subject, name, prepared, one, stabilise) for one in _spread(subject, name, prepared, points)]
    if not seconds:
        raise UnsupportedLayer(f"no format can factorise {layer}: {'; '.join(dict.fromkeys(refused.values()))}.")
    return Decomposition(
        layer=layer,
        conv=subject.conv,
        kind="weight-only" if subject.statistics is None else "activation-aware",
        stabilise=stabilise,
        chosen=chosen,
        rows=tuple(rows),
        prepare_seconds=seconds,
        refused=refused,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """A layer's kernel, and what is known of its inputs."""

    conv: Conv
    weight: Tensor
    statistics: Statistics | None
    stabilise: StabiliseSpec

    @property
    def root(self) -> Tensor | None:
        """Square root of the second moment of the inputs, one for every group in front; for 1x1 kernels not known."""
        moment = None if self.statistics is None else self.statistics.input_moment
        if moment is None or moment.numel() == 0:
            return None
        rows = moment.chunk(self.conv.groups)
        return torch.stack([square_roots(row.chunk(len(rows), 1)[i])[0] for i, row in enumerate(rows)])


def _read(
    model: str | Path,
    layer: str,
    weights: str | Path | None,
    input_shape: Shape | None,
    storage: str | Path | None,
    notify: Notify,
) -> _Subject:
    cache = Store(storage).cache
    space, statistics = None, None
    if Path(model).suffix in (".yaml", ".yml"):
        settings = [f"model.weights={weights}"] if weights else []
        space = located(load_space(Path(model), settings), Path(model).resolve().parent)
    elif str(model) == "digits-cnn" and weights is None:
        space = Space(model=ModelSpec(name=str(model)))
    elif weights is None:
        rule = f"the pretrained weights of {model} must be given, found none."
        raise ModelError(f"{rule} Give a safetensors file or a state dict, e.g. --weights dense.safetensors.")
    if space is not None:
        network = read_network(space, cache, notify)
        conv = _find(network.model, layer, network.record.input_shape)
        statistics = statistics_of(network, {layer: conv}, cache, notify)[layer]
        dense, stabilise = network.model, space.stabilise
    else:
        shape = input_shape or input_shape_of(str(model))
        dense = build_model(ModelSpec(name=str(model)), weights=find_weights(str(weights), [Path()]))
        conv, stabilise = _find(dense, layer, shape), StabiliseSpec()
    weight, _ = kernel_of(dense.get_submodule(layer))
    return _Subject(conv=conv, weight=weight, statistics=statistics, stabilise=stabilise)


def _find(model: nn.Module, layer: str, input_shape: Shape) -> Conv:
    found = {one.name: one.conv for one in find_layers(model, input_shape)}
    if layer not in found:
        near = ", ".join(get_close_matches(layer, found, n=4, cutoff=0.3) or list(found)[:4])
        raise ModelError(
            f"a layer must be a convolution or linear layer of the network, found {layer!r}. Names are like {near}."
        )
    return found[layer]


def _check(subject: _Subject, layer: str, name: str, *, asked: bool, ranks: Ranks | None) -> None:
    """Raise UnsupportedLayer where a format is not for the layer, RankError for wrong ranks of that ``asked`` for."""
    try:
        bounds = max_rank(FORMATS[name], subject.conv)
        if asked and ranks is not None:
            check_ranks(FORMATS[name], subject.conv, ranks)
    except UnsupportedLayer as reason:
        if not asked:
            raise
        raise UnsupportedLayer(f"{name} cannot factorise {layer}: {reason}. Choose another --format.") from reason
    if asked and ranks is None:
        raise RankError(f"ranks of {name} must be given for {layer}, from {(1,) * len(bounds)} to {bounds}.")


def _refuse_unknown(names: Sequence[str]) -> None:
    if problems := unknown_formats(Space(model=ModelSpec(name="any"), formats=[*names] or ["tucker2"])):
        raise SpaceError("--format", problems)


def _spread(subject: _Subject, name: str, prepared: Prepared, points: int) -> list[Ranks]:
    """Ranks cheaper than dense, spread over the MACs: of each equal part of them the least predicted error."""
    form, conv = FORMATS[name], subject.conv
    best: dict[int, tuple[float, int, Ranks]] = {}
    for ranks in rank_grid(form, conv, RanksSpec()):
        macs = sum(stage.macs for stage in compressed_stages(form, conv, ranks))
        if macs < conv.macs:
            part = points * macs // conv.macs
            found = (error(form, conv, prepared, ranks), macs, ranks)
            best[part] = min(best.get(part, found), found)
    return [best[part][2] for part in sorted(best)]


def _row(subject: _Subject, name: str, prepared: Prepared, ranks: Ranks, stabilise: StabiliseSpec) -> Row:
    form, conv = FORMATS[name], subject.conv
    stages = compressed_stages(form, conv, ranks)
    started = time.perf_counter()
    factors = kernels(form, conv, prepared, ranks, stabilise)
    seconds = time.perf_counter() - started
    measured: Report = report(form, conv, ranks, subject.weight, factors, subject.root)
    macs = sum(stage.macs for stage in stages)
    return Row(
        format=name,
        ranks=ranks,
        macs=macs,
        macs_ratio=macs / conv.macs,
        params=sum(stage.params for stage in stages),
        relative_error=measured.relative_error,
        sensitivity=measured.sensitivity,
        degeneracy=measured.degeneracy,
        seconds=seconds,
    )
